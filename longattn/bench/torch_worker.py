"""PyTorch's side of `longattn compare attention`, run by the interpreter that has PyTorch.

It needs PyTorch and NumPy alone. It reads one JSON command per line on stdin and answers
each with one JSON line on stdout:

    {"command": "load", "folder": ..., "dtype": ..., "threads": ..., "causal": ..., "mask": ...}
    {"command": "run", "what": "forward" | "forward_backward"}          -> {"seconds": ...}, timed here
    {"command": "save", "what": ...}     writes out.npy (and dq, dk, dv) into the folder, float32 [B T H D]
"""

import json
import os
import sys
import time


class Worker:
    def __init__(self):
        import torch

        self.torch = torch

    def load(self, folder, dtype, threads, causal, mask):
        """Reads q, k, v, do from [B T H D] float32 files into PyTorch's layout [B H T D], contiguous."""
        torch, self.folder = self.torch, folder
        torch.set_num_threads(threads)
        self.q, self.k, self.v, self.do = (self._read(name).to(getattr(torch, dtype)) for name in ("q", "k", "v", "do"))
        for x in (self.q, self.k, self.v):
            x.requires_grad_(True)
        self.options = {"is_causal": causal, "enable_gqa": self.q.shape[1] != self.k.shape[1]}
        if mask:
            self.options["attn_mask"] = torch.from_numpy(self._numpy("mask"))
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def _numpy(self, name):
        import numpy

        return numpy.load(os.path.join(self.folder, name + ".npy"))

    def _read(self, name):
        return self.torch.from_numpy(self._numpy(name)).transpose(1, 2).contiguous()

    def _call(self, what):
        attend = self.torch.nn.functional.scaled_dot_product_attention
        if what == "forward":
            with self.torch.no_grad():
                return [attend(self.q, self.k, self.v, **self.options)]
        out = attend(self.q, self.k, self.v, **self.options)
        return [out, *self.torch.autograd.grad(out, (self.q, self.k, self.v), self.do)]

    def run(self, what):
        start = time.perf_counter()
        self._call(what)
        return {"seconds": time.perf_counter() - start}

    def save(self, what):
        import numpy

        for name, x in zip(("out", "dq", "dk", "dv"), self._call(what)):
            numpy.save(os.path.join(self.folder, name + ".npy"), x.detach().transpose(1, 2).float().numpy())
        return {}


def main():
    try:
        worker = Worker()
        print(json.dumps({"ready": worker.torch.__version__}), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(worker, arguments.pop("command"))(**arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
