// What a program written with @solana/web3.js does on any cluster. Arguments: RPC URL, WebSocket URL.
const assert = require("node:assert");
const web3 = require("@solana/web3.js");
const [rpc, ws] = process.argv.slice(2);

async function main() {
  const connection = new web3.Connection(rpc, { commitment: "confirmed", wsEndpoint: ws });
  const payer = web3.Keypair.generate();
  const to = web3.Keypair.generate().publicKey;
  const funded = await connection.requestAirdrop(payer.publicKey, 5 * web3.LAMPORTS_PER_SOL);
  await connection.confirmTransaction({ signature: funded, ...(await connection.getLatestBlockhash()) });
  assert((await connection.getBalance(payer.publicKey)) === 5 * web3.LAMPORTS_PER_SOL);

  let changed, logged, moved;
  const pushed = Promise.all([
    new Promise((resolve) => (changed = connection.onAccountChange(to, resolve))),
    new Promise((resolve) => (logged = connection.onLogs(payer.publicKey, resolve))),
    new Promise((resolve) => (moved = connection.onSlotChange(resolve))),
  ]);
  await new Promise((resolve) => setTimeout(resolve, 500)); // web3.js gives no sign of when it has subscribed

  const pay = () => new web3.Transaction().add(
    web3.SystemProgram.transfer({ fromPubkey: payer.publicKey, toPubkey: to, lamports: web3.LAMPORTS_PER_SOL }));
  const sent = await web3.sendAndConfirmTransaction(connection, pay(), [payer]);
  const [account, logs, slot] = await pushed;
  assert(account.lamports === web3.LAMPORTS_PER_SOL);
  assert(logs.signature === sent && logs.err === null);
  assert(slot.slot > 0);
  await connection.removeAccountChangeListener(changed);
  await connection.removeOnLogsListener(logged);
  await connection.removeSlotChangeListener(moved);

  const found = await connection.getTransaction(sent, { maxSupportedTransactionVersion: 0 });
  assert(found.meta.err === null && found.meta.fee === 5000);
  assert(found.transaction.message.staticAccountKeys ?? found.transaction.message.accountKeys);
  const history = await connection.getSignaturesForAddress(payer.publicKey);
  assert(history.some((one) => one.signature === sent));
  const status = await connection.getSignatureStatus(sent);
  assert(status.value.err === null);

  const latest = await connection.getLatestBlockhash();
  const message = new web3.TransactionMessage({
    payerKey: payer.publicKey, recentBlockhash: latest.blockhash,
    instructions: [web3.SystemProgram.transfer({ fromPubkey: payer.publicKey, toPubkey: to, lamports: 1 })],
  }).compileToV0Message();
  const versioned = new web3.VersionedTransaction(message);
  versioned.sign([payer]);
  assert((await connection.simulateTransaction(versioned)).value.err === null);
  const second = await connection.sendRawTransaction(versioned.serialize());
  await connection.confirmTransaction({ signature: second, ...latest });
  assert((await connection.getFeeForMessage(message)).value === 5000);
  assert((await connection.getMultipleAccountsInfo([to, payer.publicKey])).length === 2);

  await assert.rejects(
    web3.sendAndConfirmTransaction(connection, new web3.Transaction().add(web3.SystemProgram.transfer(
      { fromPubkey: payer.publicKey, toPubkey: to, lamports: 100 * web3.LAMPORTS_PER_SOL })), [payer]),
    /custom program error: 0x1/);
  console.log("ok");
}

main().then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
