// Starts Surfpool (an independent Solana validator stand-in) and prints its URLs; ends when its input ends.
const { Surfnet } = require("@solana/surfpool-linux-x64-gnu");
const surfnet = Surfnet.startWithConfig({ offline: true, blockProductionMode: "clock", slotTimeMs: 100 });
console.log(JSON.stringify({ rpc: surfnet.rpcUrl, ws: surfnet.wsUrl }));
process.stdin.resume();
process.stdin.on("end", () => process.exit(0));
