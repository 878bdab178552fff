"""Result files as tables: for the terminal when the suite ends, and for kernels/README.md.

Every ratio compares times of one run, measured in turns.  A cell without a measurement is a dash.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import results

OURS, CUBLAS = "llmq", "cublas"
RIVALS = ("tinygemm", "gemlite")
NONE = "–"
# M -> (times cuBLAS, times the better of tinygemm and gemlite) that are the target, over the layers of 8B in bf16
TARGETS: Mapping[int, tuple[float, float | None]] = {
    1: (2.8, 1.3), 16: (2.8, 1.3), 64: (1.5, None), 256: (0.95, None), 512: (0.95, None), 1024: (0.95, None),
    2048: (0.95, None),
}  # fmt: skip
DECODE_TARGET = 2.5

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and the cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [_line(self.columns, widths), _line(["-" * width for width in widths], widths)]
        return "\n".join([f"**{self.title}**", "", *lines, *(_line(row, widths) for row in self.rows)])


def report(content: Mapping[str, Any]) -> str:
    """All tables of a GPU's file."""
    parts = [heading(content), *(table.markdown() for table in gpu_tables(content))]
    return "\n\n".join(parts)


def heading(content: Mapping[str, Any]) -> str:
    """Hardware, date, software and the two ceilings."""
    cases = results.cases(content, "environment")
    machine, copy, matmul = (cases.get(case, {}) for case in ("machine", "copy", "matmul"))
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    ceilings = f"copy {copy.get('bytes_per_second', 0) / 1e12:.2f} TB/s (read plus written), "
    ceilings += f"bf16 matmul {matmul.get('operations_per_second', 0) / 1e12:.0f} TFLOP/s"
    where = f"{content['name']}, {content['date']}, driver {machine.get('driver_version') or NONE}"
    return f"### {where}\n\n{packages}; kernels {machine.get('sources', NONE)}; measured ceilings: {ceilings}."


def gpu_tables(content: Mapping[str, Any]) -> list[Table]:
    """The tables of a GPU's file, without sections that were not run."""
    copy = results.cases(content, "environment").get("copy", {}).get("bytes_per_second")
    measured = [*outcomes(content, "command_line", "The command line from end to end"), *correctness(content)]
    measured += w4a16(results.cases(content, "w4a16").values(), copy)
    measured += [*gptq(results.cases(content, "gptq")), *decode(results.cases(content, "decode"))]
    measured += outcomes(content, "disk", "Disk and bus")
    return [*measured, *incomplete(content)]


def outcomes(content: Mapping[str, Any], section: str, title: str) -> list[Table]:
    """Every case of a section and its summary, and the cases that failed."""
    cases = results.cases(content, section).items()
    rows = [[f"{'WRONG: ' if case.get('wrong') else ''}{name}", case["summary"]] for name, case in cases]
    rows += [[f"FAILED: {record['case']}", record["error"]] for record in results.errors(content, section)]
    return [Table(title, ("what", "outcome"), rows)] if rows else []


def incomplete(content: Mapping[str, Any]) -> list[Table]:
    """Sections that did not finish, and what they left out."""
    rows = []
    for name, section in content["sections"].items():
        left = [record["case"] for record in section["records"] if record["kind"] == "left out"]
        if section["status"] != "done":
            rows.append(
                [name, section["status"], f"{len(left)} cases left out" + (f", from {left[0]} on" if left else "")]
            )
    return [Table("Not complete", ("section", "status", "left out"), rows)] if rows else []


def correctness(content: Mapping[str, Any]) -> list[Table]:
    """The checks and their failures."""
    cases = results.cases(content, "correctness")
    if not cases and not results.errors(content, "correctness"):
        return []
    wrong = [name for name, case in cases.items() if case.get("wrong")]
    programs = ("racecheck", "memcheck")
    checks = [name for name in cases if name not in (*programs, "compile")]
    right = sum(name not in wrong for name in checks)
    rows = [["checks against the definitions, same bits in repeats", f"{right} of {len(checks)} right"]]
    rows += [[name, cases[name]["summary"]] for name in programs if name in cases]
    rows += [[f"WRONG: {name}", cases[name].get("summary", "")] for name in wrong]
    rows += [[f"FAILED: {record['case']}", record["error"]] for record in results.errors(content, "correctness")]
    return [Table("Correct, compiled", ("what", "outcome"), rows)]


def w4a16(cases: Iterable[Case], copy: float | None) -> list[Table]:
    """One table per model, dtype and grid: the sum over layers, by rows."""
    campaigns: dict[tuple[str, str, int, bool], list[Case]] = {}
    for case in cases:
        key = (case["model"], case["dtype"], case["group"], case["asymmetric"])
        campaigns.setdefault(key, []).append(case)
    return [_campaign(key, measured, copy) for key, measured in campaigns.items()]


def _campaign(key: tuple[str, str, int, bool], cases: Sequence[Case], copy: float | None) -> Table:
    model, dtype, group, asymmetric = key
    layers = dict.fromkeys(case["layer"] for case in cases)
    rows = []
    for M in sorted({case["M"] for case in cases}):
        here = [case for case in cases if case["M"] == M]
        if len(here) == len(layers):
            target = TARGETS.get(M) if (model, dtype, group, asymmetric) == ("8B", "bfloat16", 128, False) else None
            rows.append(_rows_of(M, here, copy, target))
    title = f"W4A16 linear, {model} ({', '.join(layers)}), {dtype}, g{group} "
    title += "asymmetric" if asymmetric else "symmetric"
    columns = ("M", "µs", "x cuBLAS", "target", "x best of tinygemm, gemlite", "target", "x naive Triton",
               "x dequantize + cuBLAS", "GB/s", "of copy", "largest error")  # fmt: skip
    return Table(title, columns, rows)


def _rows_of(M: int, cases: Sequence[Case], copy: float | None, target: tuple[float, float | None] | None) -> list[str]:
    own = sum(case["microseconds"][OURS]["median"] for case in cases)
    rate = sum(case["bytes"] for case in cases) / own * 1e6
    rival = together(cases, RIVALS)
    return [
        str(M),
        f"{own:.1f}",
        _ratio(together(cases, [CUBLAS]), own),
        f"{target[0]}" if target else "",
        _ratio(rival, own),
        f"{target[1]}" if target and target[1] else "",
        _ratio(together(cases, ["naive_triton"]), own),
        _ratio(together(cases, ["dequantize"]), own),
        f"{rate / 1e9:.0f}",
        f"{rate / copy:.0%}" if copy else NONE,
        f"{max(case['error'] for case in cases):.1e}",
    ]


def together(cases: Sequence[Case], contenders: Sequence[str]) -> float | None:
    """Microseconds over all cases, each by the fastest of the contenders; None if a case has none of them."""
    best = [
        min((case["microseconds"][name]["median"] for name in contenders if name in case["microseconds"]), default=None)
        for case in cases
    ]
    known = [value for value in best if value is not None]
    return sum(known) if len(known) == len(cases) else None


def gptq(cases: Mapping[str, Case]) -> list[Table]:
    """Steps of each method compared with the floors of GPTQ, then the whole."""
    measured = [_steps_of(case) for name, case in cases.items() if name.startswith("few blocks")]
    shown = ("hessian", "factorize", "round", "tuning")
    rows = [[name, case["summary"]] for name, case in cases.items() if name.startswith(shown)]
    whole = cases.get("whole model")
    if whole is not None:
        target = f"target: {whole['target_seconds']:.0f} s on an H200"
        rows.append([f"whole model, {whole['of_blocks']} blocks", f"{whole['summary']}; {target}"])
    return [*measured, Table("Quantizing, step by step", ("what", "time"), rows)] if rows else measured


def _steps_of(case: Case) -> Table:
    rows = [
        [step, f"{seconds:.2f}", f"{case['floors'][step]:.1f}" if step in case["floors"] else NONE]
        for step, seconds in sorted(case["steps"].items(), key=lambda item: -item[1])
    ]
    rows.append(["all but making weights and saving", f"{case['seconds']:.2f}", NONE])
    if case.get("preparation_seconds") is not None:
        rows.append([f"token weights of {case['blocks']} blocks", f"{case['preparation_seconds']:.2f}", NONE])
    title = f"{case['method']}, {case['of_blocks']} blocks extrapolated from {case['counted_blocks']}, "
    return Table(title + f"{case['tokens']} tokens", ("step", "s", "floor on an H200, s"), rows)


def decode(cases: Mapping[str, Case]) -> list[Table]:
    """Tokens per second, packed compared with bf16; memory compared with the sum of the tensors."""
    speeds = [case for case in cases.values() if "tokens_per_second" in case]
    rows = []
    for batch, mode in dict.fromkeys((case["batch"], case["mode"]) for case in speeds):
        rate = {
            case["kind"]: case["tokens_per_second"] for case in speeds if (case["batch"], case["mode"]) == (batch, mode)
        }
        packed, plain = rate.get("packed"), rate.get("bf16")
        target = f"{DECODE_TARGET}" if (batch, mode) == (1, "graphs") else ""
        rows.append([str(batch), mode, _number(packed), _number(plain), _ratio(packed, plain), target])
    others = [[name, case["summary"]] for name, case in cases.items() if name.endswith(("compiled", "kernels"))]
    memory = [[name, case["summary"], f"{case['ratio']:.3f}"] for name, case in cases.items() if "tensor_bytes" in case]
    speed = [Table("Decoding, tokens per second", ("batch", "mode", "4 bits", "bf16", "ratio", "target"), rows)]
    measured = speed if rows else []
    measured += [Table("Decoding, compiled and profiled", ("what", "outcome"), others)] if others else []
    return [*measured, Table("Memory in use", ("model", "bytes", "over its tensors"), memory)] if memory else measured


def cpu(content: Mapping[str, Any]) -> str:
    """The table of a CPU's file, from `bench.cpu` or from `bench.cpu_decode`."""
    heading = f"### {content['cpu']}, {content['date']}, threads: {content['threads']}"
    table = _cpu_decode(content) if "models" in content else _cpu_linear(content["cases"], content.get("bits", 4))
    note = f"\n\n{content['note']}" if content.get("note") else ""
    return f"{heading}{note}\n\n{table.markdown()}"


def _cpu_linear(cases: Sequence[Case], bits: int) -> Table:
    names = list(dict.fromkeys(name for case in cases for name in case["microseconds"]))
    ratios = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    rows = [
        [f"{case['N']} x {case['K']}", str(case["M"]),
         *(f"{case['microseconds'][name]['median']:.0f}" if name in case["microseconds"] else NONE for name in names),
         *(f"{case['ratios'][name]:.2f}" if name in case["ratios"] else NONE for name in ratios)]
        for case in cases
    ]  # fmt: skip
    columns = ["N x K", "M", *(f"{name}, µs" for name in names), *(name.replace("_", " ") for name in ratios)]
    return Table(f"Linear layers, {bits} bits", columns, rows)


def _cpu_decode(content: Mapping[str, Any]) -> Table:
    shape = content["shape"]
    rows = [
        [name, f"{model['tokens_per_second']:.1f}", f"{model['step_microseconds']['median'] / 1000:.1f}"]
        for name, model in content["models"].items()
    ]
    title = f"Decoding, batch 1: a random Llama of {shape['num_hidden_layers']} layers, {shape['hidden_size']} wide"
    return Table(title, ["model", "tokens per second", "ms per step"], rows)


def _ratio(other: float | None, own: float | None) -> str:
    return NONE if other is None or own is None else f"{other / own:.2f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
