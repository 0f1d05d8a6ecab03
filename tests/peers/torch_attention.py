"""Attention alone in PyTorch 2, which ours is compared with: dense causal scaled-dot-product attention by every backend that
PyTorch offers here, and flex attention with the chunk mask, compiled. One JSON line per backend and length; a backend that
cannot run says why in "error". On a GPU several calls are timed as one CUDA graph, like ours, so that neither Python nor
launches count; "timed_as" says so, or that they could only be queued.

    python torch_attention.py --device cuda --lengths 1024,4096,16384,65536 --tokens 65536 --dtype bfloat16
    python torch_attention.py --check          the mask and the arithmetic against a plain softmax; small, exits 1 if wrong
"""

import argparse
import json
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError as missing:
    sys.exit(f"{sys.argv[0]}: needs PyTorch 2.5 or newer ({missing}): pip install torch, or name a Python that has it")

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def chunk_mask(chunk, leading):
    """Of uniform chunks: a query sees chunk ends and its last `leading` tokens, itself among them (0: its own chunk so far)."""

    def allowed(b, h, query, key):
        recent = key > query - leading if leading else key // chunk == query // chunk
        return (query >= key) & (((key + 1) % chunk == 0) | recent)

    return allowed


def keys_per_query(n, chunk, leading):
    """On average under that mask; every earlier token with chunk = 1."""
    seen = 0
    for t in range(n):
        window = min(t + 1, leading) if leading else t % chunk + 1
        seen += window + (t + 1 - window) // chunk
    return seen / n


CALLS = 8  # timed together on a GPU, like ours (time_calls in launch/benchmark.cpp): none of them is the start of a row


def recorded(run):
    """CALLS runs as one CUDA graph, which is how ours are launched."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, chooses algorithms and makes workspaces: nothing that can be captured
        run(), run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    torch.cuda.synchronize()
    graph.replay()  # the first also uploads it
    return graph.replay


def row_of_calls(run):
    """What enqueues CALLS runs, as a graph or, where they cannot be captured, one by one; and which it is."""
    try:
        return recorded(run), {"timed_as": f"CUDA graph of {CALLS} calls"}
    except Exception as error:
        torch.cuda.synchronize()
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]

    def one_by_one():
        for _ in range(CALLS):
            run()

    return one_by_one, {"timed_as": f"{CALLS} queued calls", "no_graph": reason}


def timed(run, device, seconds):
    """Best and median seconds of `run`, by the device's clock, after two runs that are not counted."""
    run(), run()
    times, how, began = [], {}, time.perf_counter()
    if device.type == "cuda":
        row, how = row_of_calls(run)
        row()
        began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            row()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / CALLS)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return {"best_seconds": min(times), "median_seconds": statistics.median(times), "timed": len(times), **how}


class Problem:
    def __init__(self, args, n):
        self.sequences = max(1, args.tokens // n)
        self.dtype = getattr(torch, args.dtype)
        make = lambda heads: torch.randn(self.sequences, heads, n, args.head_dim, device=args.device, dtype=self.dtype,
                                         requires_grad=True)
        torch.manual_seed(0)
        self.q, self.k, self.v = make(args.heads), make(args.kv_heads), make(args.kv_heads)
        self.dout = torch.randn_like(self.q)
        self.grouped = args.heads != args.kv_heads

    def both(self, attend):
        out = attend(self.q, self.k, self.v)
        return (out, *torch.autograd.grad(out, (self.q, self.k, self.v), self.dout))


def dense(problem):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=problem.grouped)


def flex(problem, args, n, compiled=True):
    mask = create_block_mask(chunk_mask(args.chunk, args.leading), None, None, n, n, device=args.device)
    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=problem.grouped), mask


def report(args, n, pattern, backend, problem, attend, extra=None):
    row = {"pattern": pattern, "backend": backend, "sequence_length": n, "sequences": problem.sequences, "heads": args.heads,
           "kv_heads": args.kv_heads, "head_dim": args.head_dim, "dtype": args.dtype, "device": args.device,
           "torch": torch.__version__, **(extra or {})}
    try:
        with torch.no_grad():
            row["forward"] = timed(lambda: attend(problem.q, problem.k, problem.v), problem.q.device, args.seconds)
        row["forward_backward"] = timed(lambda: problem.both(attend), problem.q.device, args.seconds)
    except Exception as error:  # a backend that is not there, does not take these shapes, or runs out of memory
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(row), flush=True)


def measure(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    backends = args.backends.split(",")
    for n in args.lengths:
        problem = Problem(args, n)
        for name in backends:
            if name not in BACKENDS:
                continue
            def attend(q, k, v, run=dense(problem), backend=BACKENDS[name]):
                with sdpa_kernel(backend):
                    return run(q, k, v)
            report(args, n, "dense", name, problem, attend, {"keys_per_query": keys_per_query(n, 1, 1)})
        if "flex" in backends:
            try:
                attend, mask = flex(problem, args, n)
            except Exception as error:
                print(json.dumps({"pattern": "chunks", "backend": "flex", "sequence_length": n, "error": str(error)[:300]}))
                continue
            report(args, n, "chunks", "flex", problem, attend, {"keys_per_query": keys_per_query(n, args.chunk, args.leading),
                                                                   "mask_sparsity_percent": float(mask.sparsity())})
        del problem


def check(args):
    """Flex attention and SDPA, both directions, against softmax over an explicit mask in float64."""
    ok = True
    for chunk, leading, n in ((8, 16, 300), (8, 0, 128), (5, 3, 130)):
        args.chunk, args.leading, args.tokens, args.dtype = chunk, leading, n, "float32"
        problem = Problem(args, n)
        position = torch.arange(n)
        allowed = chunk_mask(chunk, leading)(None, None, position[:, None], position[None, :])
        ok &= keys_per_query(n, chunk, leading) == allowed.double().sum().item() / n
        # The definition again, with lists instead of formulas.
        for t in range(n):
            ends = {k for k in range(t + 1) if (k + 1) % chunk == 0}
            first = max(0, t - leading + 1) if leading else t - t % chunk
            ok &= set(allowed[t].nonzero().flatten().tolist()) == ends | set(range(first, t + 1))
        for pattern, mask, attend in (("chunks", allowed, flex(problem, args, n, compiled=False)[0]),
                                      ("dense", position[:, None] >= position[None, :], dense(problem))):
            def plain(q, k, v, mask=mask):
                repeat = q.shape[1] // k.shape[1]
                k, v = (a.double().repeat_interleave(repeat, 1) for a in (k, v))
                scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
                return scores.masked_fill(~mask.to(q.device), -torch.inf).softmax(-1) @ v
            try:
                found = problem.both(attend)
            except NotImplementedError as error:  # flex attention has no backward pass on some CPUs
                found = (attend(problem.q.detach(), problem.k.detach(), problem.v.detach()),)
                print(json.dumps({"pattern": pattern, "note": str(error).splitlines()[0]}))
            out = plain(problem.q, problem.k, problem.v)
            wanted = (out, *torch.autograd.grad(out, (problem.q, problem.k, problem.v), problem.dout.double()))
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
            ok &= all(e < 1e-5 for e in errors)
            print(json.dumps({"pattern": pattern, "chunk": chunk, "leading": leading, "n": n, "errors": errors}))
    print(json.dumps({"ok": ok}))
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="per call; a length above gives one sequence")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8, help="tokens per chunk")
    parser.add_argument("--leading", type=int, default=16, help="recent tokens seen in full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--backends", default="flash,cudnn,efficient,flex", help=f"of {', '.join(BACKENDS)} and flex")
    parser.add_argument("--seconds", type=float, default=0.2, help="for which each is timed")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true", help="compare with a plain softmax instead of measuring")
    args = parser.parse_args()
    if args.check:
        sys.exit(0 if check(args) else 1)
    measure(args)


if __name__ == "__main__":
    main()
