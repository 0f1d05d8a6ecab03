"""Puts what tests/gpu_check.sh left in its folder into report.json there, compares it with the goals, and prints a table of both.

    python gpu_report.py FOLDER cuda|cpu SECONDS [WHY THERE IS NO GPU]

Exits 1 when a step failed or something is wrong; speeds and curves in bfloat16 that miss their goal are reported only.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

WINDOW = 50  # steps


def json_of(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def json_lines(path):
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        if line.startswith("{"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass
    return rows


def steps_of(folder):
    steps = {}
    for file in sorted(folder.glob("*.step"), key=lambda f: f.stat().st_mtime):
        code, seconds, limit = file.read_text().split()
        command = (folder / f"{file.stem}.command").read_bytes().decode().split("\0")[:-1]
        log = folder / f"{file.stem}.log"
        steps[file.stem] = {
            "command": command, "exit_code": None if code in ("skipped", "unfinished") else int(code),
            "skipped": code == "skipped", "unfinished": code == "unfinished",
            "timed_out": code in ("124", "137", "unfinished"), "seconds": float(seconds), "limit_seconds": float(limit),
            "end_of_log": log.read_text(errors="replace").splitlines()[-15:] if log.exists() else [],
        }
    return steps


def losses_of(folder, run):
    """Loss by step of a training run."""
    return {row["step"]: row["loss"] for row in json_lines(folder / "runs" / run / "metrics.jsonl") if "loss" in row}


def relative_differences(expected, found):
    return [abs(e - f) / abs(e) for e, f in zip(expected, found)]


def curves(folder, dtype):
    """How far the losses of CPU and device are apart: step by step, and as means over windows of WINDOW steps."""
    cpu, device = losses_of(folder, f"curve_cpu_{dtype}"), losses_of(folder, f"curve_device_{dtype}")
    common = sorted(set(cpu) & set(device))
    if not common:
        return None
    finite = all(losses[s] is not None and math.isfinite(losses[s]) for losses in (cpu, device) for s in common)
    result = {"steps": len(common), "finite": finite, "largest_relative_difference": None, "largest_of_window_means": None}
    if not finite:
        return result
    windows = [common[i:i + WINDOW] for i in range(0, max(1, len(common) - WINDOW + 1), WINDOW)]
    singles = relative_differences([cpu[s] for s in common], [device[s] for s in common])
    means = relative_differences(*([statistics.mean(losses[s] for s in w) for w in windows] for losses in (cpu, device)))
    return {**result, "first_loss": cpu[common[0]], "last_loss_cpu": cpu[common[-1]], "last_loss_device": device[common[-1]],
            "largest_relative_difference": max(singles), "mean_relative_difference": statistics.mean(singles),
            "window": WINDOW, "relative_differences_of_window_means": means, "largest_of_window_means": max(means)}


def training(folder):
    rows = json_lines(folder / "runs/train/metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    if not logged:
        return None
    return {"steps": logged[-1]["step"], "first_loss": logged[0]["loss"], "last_loss": logged[-1]["loss"],
            "eval_loss": [row["eval_loss"] for row in rows if "eval_loss" in row],
            "tokens_per_s_median": statistics.median(row["tokens_per_s"] for row in logged if "tokens_per_s" in row)}


def compared(log):
    """What train.compare_cpu said of the first batch."""
    text = log.read_text(errors="replace") if log.exists() else ""
    agree = re.search(r"compared with the CPU: (\d+) results agree", text)
    differ = re.search(r"compared with the CPU: result (\d+ of \d+)", text)
    return f"agree ({agree[1]})" if agree else f"differ ({differ[1]})" if differ else None


def attention_speedups(kernels, lines):
    """Forward and backward of chunk attention against the fastest dense backend of PyTorch, by length."""
    speedups = {}
    for row in (kernels or {}).get("attention", []):
        n = row["sequence_length"]
        dense = [l["forward_backward"]["median_seconds"] for l in lines
                 if l.get("pattern") == "dense" and l["sequence_length"] == n and "error" not in l]
        if row["pattern"] == "chunks" and dense:
            speedups[n] = min(dense) / row["forward_backward"]["median_seconds"]
    return speedups


def goals_of(folder, device, steps, results, no_gpu):
    """What has to be right and what ought to be fast; "reached" is None where nothing was measured, or not on a GPU. Without a
    GPU no speed is reported: those of the CPU's tiny sizes would say nothing."""
    goals = []

    def add(kind, name, measured, target, reached):
        if no_gpu and kind == "fast":
            measured = reached = None
        goals.append({"kind": kind, "goal": name, "measured": measured, "target": target, "reached": reached})

    def right(name, step):
        found = steps.get(step)
        ran = found and not found["skipped"]
        add("right", name, f"exit code {found['exit_code']}" if ran else None, "exit code 0",
            found["exit_code"] == 0 if ran else None)

    def at_least(name, value, target):
        add("fast", name, value, f">= {target:g}", None if value is None or device == "cpu" else value >= target)

    def rate(name):
        return results[name]["tokens_per_s_median"] if results.get(name) else None

    right("golden files, float32", "verify_float32")
    right("golden files, bfloat16", "verify_bfloat16")
    right("every kernel agrees with the CPU's", "kernels")
    agrees = None if no_gpu else results["compare"]
    add("right", "every operation of a model agrees with the CPU's", agrees, "agree", agrees and agrees.startswith("agree"))
    for tool in ("memcheck", "racecheck", "synccheck", "kernels"):
        right(f"compute-sanitizer: {tool}", f"sanitizer_{tool}")
    right("a real training", "train")
    # Curves in bfloat16 part by their rounding alone (docs/numerics.md), so how far is measured and nothing is wrong.
    for dtype, kind in (("float32", "right"), ("bfloat16", "near")):
        curve = None if no_gpu else results["curves"][dtype]
        if curve:
            add("right", f"losses of CPU and device are finite, {dtype}", str(curve["finite"]), "True", curve["finite"])
        for name, key in (("single steps", "largest_relative_difference"), (f"means over {WINDOW}", "largest_of_window_means")):
            difference = curve and curve[key]
            add(kind, f"loss curves of CPU and device, {dtype}, largest relative difference, {name}", difference, "< 0.001",
                None if difference is None else difference < 1e-3)
    at_least("tokens/s, 62M, 16 x 1024", rate("step_short"), 1.0e6)
    at_least("tokens/s, 62M, 80 x 1024", rate("step_long"), 1.3e6)
    for n, target in ((4096, 2.0), (16384, 3.5), (65536, 4.3)):
        at_least(f"chunk attention against PyTorch's best dense one, forward and backward, n = {n}",
                 results["attention_speedups"].get(n), target)
    kernels = results.get("bench_kernels") or {}
    for name in ("chunk_scan", "chunk_scan_backward"):
        shares = [k["bytes_per_s"] / kernels["copy_bytes_per_s"] for k in kernels.get("kernels", []) if k["kernel"] == name]
        at_least(f"{name}: share of copy bandwidth", min(shares) if shares else None, 0.8)
    outside = kernels.get("outside_share")
    add("fast", "share of a step outside kernels", outside, "< 0.03",
        None if outside is None or device == "cpu" else outside < 0.03)
    for n, target in ((1024, 1.0), (8192, 1.5), (32768, 2.5)):
        ours, dense = rate(f"attamba_{n}"), rate(f"transformer_{n}")
        at_least(f"tokens/s, Attamba over transformer, n = {n}", ours / dense if ours and dense else None, target)
    return goals


def main():
    folder, device, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    no_gpu = " ".join(sys.argv[4:]).strip()
    steps = steps_of(folder)
    results = {file.stem: json_of(file) for file in folder.glob("*.json") if file.name != "report.json"}
    results["torch_attention"] = json_lines(folder / "torch_attention.log")
    for name in ("torch_attamba", "torch_transformer", "torch_attamba_compiled", "torch_transformer_compiled"):
        results[name] = (json_lines(folder / f"{name}.log") or [None])[0]
    results["curves"] = {dtype: curves(folder, dtype) for dtype in ("float32", "bfloat16")}
    results["compare"] = compared(folder / "compare.log")
    results["attention_speedups"] = attention_speedups(results.get("bench_kernels"), results["torch_attention"])
    results["train"] = training(folder)
    environment = folder / "environment.log"
    text = environment.read_text(errors="replace") if environment.exists() else ""
    version = re.search(r"^attamba .*", text, re.M)
    chip = re.search(r"name, driver_version.*\n(.*)", text)
    goals = goals_of(folder, device, steps, results, no_gpu)
    failed = [name for name, step in steps.items() if step["exit_code"] not in (0, None)]
    unfinished = [name for name, step in steps.items() if step["unfinished"]]
    # A peer, a sanitizer or a benchmark that does not run is a failed step; a result that is wrong is a goal not reached.
    report = {
        "version": version and version[0], "device": device, "no_gpu": no_gpu or None, "chip": chip[1] if chip else None,
        "device_description": (results.get("bench_kernels") or {}).get("device"), "seconds": seconds,
        "environment": text.splitlines(), "goals": goals, "failed_steps": failed,
        "unfinished_steps": unfinished, "skipped_steps": [name for name, step in steps.items() if step["skipped"]],
        "steps": steps, "results": results,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for goal in goals:
        measured = goal["measured"]
        missing = "not measured: no GPU" if no_gpu else "not measured"
        measured = missing if measured is None else f"{measured:.4g}" if isinstance(measured, float) else measured
        verdict = {True: "reached", False: "MISSED", None: "-"}[goal["reached"]]
        print(f"  {goal['goal'][:88]:88} {measured:>20} {goal['target']:>12}  {verdict}")
    print(f"{folder}/report.json: {len(steps)} steps in {seconds:.0f} s, {len(failed)} failed"
          + (f" ({', '.join(failed)})" if failed else "") + (f", not finished: {', '.join(unfinished)}" if unfinished else ""))
    wrong = [g["goal"] for g in goals if g["kind"] == "right" and g["reached"] is False]
    sys.exit(1 if failed or wrong else 0)


if __name__ == "__main__":
    main()
