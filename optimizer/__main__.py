"""`python -m optimizer`: a self-check of exactness on this machine's devices. Exit status 1 if one fails."""

import sys

import torch

from optimizer import native
from optimizer.selfcheck import checks


def main() -> int:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} CUDA devices")
    print(f"kernels for CPUs: {', '.join(native.isas()) if native.available() else native.reason()}\n")
    failed = 0
    for check in checks():
        mark = {True: "ok", False: "FAILED", None: "-"}[check.good]
        failed += check.good is False
        print(f"{mark:>6}  {check.name:<32} {check.detail}", flush=True)
    print(f"\n{failed} checks failed: replicas with this machine among them would drift" if failed else "\nall exact")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
