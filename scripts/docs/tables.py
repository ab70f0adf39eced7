"""Tables of stored numbers for the topics whose command stores no table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def make_table(topic: str, name: str, record: Record) -> str:
    """Makes the table of a stored result.

    Args:
        topic (`str`): Folder of the benchmark.
        name (`str`): Name of the file, without its ending.
        record (`Mapping`): What it holds.

    Returns:
        `str`: Markdown.

    Raises:
        KeyError: There is no table for the topic: its command should store one.
    """
    return TABLES[topic if topic != "gpu" else f"gpu/{name}"](record)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _export(record: Record) -> str:
    rows = []
    for each in record["results"]:
        found, there = each["transformers"], each.get("llama_cpp", {})
        rows.append(
            [
                f"{each['model']}: E = {each['num_experts']}, K = {each['num_experts_per_tok']}",
                f"{each['bytes'] / 1e6:.1f} MB",
                f"{each['exported_bytes'] / 1e6:.1f} MB",
                f"{found['largest_difference']:.1e}",
                f"{found['same_texts']} of {found['texts']}",
                f"{there['bytes'] / 1e6:.1f} MB" if there else "",
                f"{there['largest_difference']:.1e}" if there else "",
                f"{there['same_texts']} of {there['texts']}" if there else "",
            ]
        )
    header = ["model", "MoT", "Qwen3-MoE", "logits differ by at most", "same texts"]
    return _table([*header, "GGUF, float32", "... logits in llama.cpp", "... same texts"], rows)


def _generation(record: Record) -> str:
    return _speeds(record["results"])


def _speeds(results: Sequence[Record]) -> str:
    models = list(dict.fromkeys(each["model"] for each in results))
    places = list(dict.fromkeys((each["batch_size"], each["phase"]) for each in results))
    of = {(each["batch_size"], each["phase"], each["model"]): each for each in results}

    def show(each: Record) -> str:
        lower, upper = each["relative_speed_quartiles"]
        return f"{each['relative_speed']:.2f} ({lower:.2f} to {upper:.2f})"

    rows = [[batch, phase, *(show(of[batch, phase, model]) for model in models)] for batch, phase in places]
    return "Speed relative to Qwen3-MoE in the same round, with quartiles.\n\n" + _table(
        ["rows", "phase", *models], rows
    )


def _momenta(record: Record) -> str:
    losses = record.get("results", record)
    return _table(["statistics, or mode", "loss"], [[name, f"{loss:.4f}"] for name, loss in losses.items()])


def _checks(record: Record) -> str:
    counts: dict[str, dict[str, int]] = {}
    for case in record["cases"]:
        of_file = counts.setdefault(case["name"].partition("::")[0], {})
        of_file[case["outcome"]] = of_file.get(case["outcome"], 0) + 1
    outcomes = list(dict.fromkeys(case["outcome"] for case in record["cases"]))
    rows = [[f"`tests/gpu/{file}`", *(of.get(outcome, 0) for outcome in outcomes)] for file, of in counts.items()]
    return f"{len(record['cases'])} of {record['num_tests']} tests ran.\n\n" + _table(["file", *outcomes], rows)


def _layer(record: Record) -> str:
    cases = [case for case in record["cases"] if "results" in case]
    names = list(dict.fromkeys(each["candidate"] for case in cases for each in case["results"]))
    rows = []
    for case in record["cases"]:
        of = {each["candidate"]: f"{each['relative_time']:.2f}" for each in case.get("results", [])}
        rows.append([case["name"], *([of.get(name, "") for name in names] if of else [_why(case), *names[1:]])])
        rows[-1][2:] = rows[-1][2:] if of else [""] * (len(names) - 1)
    return "Time of forward and backward pass relative to the dense layer.\n\n" + _table(["case", *names], rows)


def _model(record: Record) -> str:
    parts, left_out = [], []
    for case in record["cases"]:
        if "models" in case:
            rows = [
                [
                    name,
                    *(f"{each['times'][part]['relative_time']:.2f}" for part in ("forward and backward", "step")),
                    f"{each['optimizer_share_of_a_step']:.1%}",
                    f"{each['relative_flops']:.3f}",
                    f"{each['peak_memory_bytes'] / 1e9:.1f} GB",
                ]
                for name, each in case["models"].items()
            ]
            header = ["model", "forward and backward", "step", "optimizer's share", "FLOPs", "peak memory"]
            parts.append(f"{case['name']}, relative to the dense model:\n\n{_table(header, rows)}")
        elif "results" in case:
            parts.append(f"{case['name']}:\n\n{_speeds(case['results'])}")
        else:
            left_out.append(f"{case['name']} ({_why(case)})")
    return "\n\n".join(parts + ([f"Not measured: {', '.join(left_out)}."] if left_out else []))


def _training(record: Record) -> str:
    times = record["step_times"]
    rows = [
        [
            case["name"],
            f"{case['num_parameters'] / 1e6:.1f} M",
            f"{times[case['name']]['relative_flops']:.2f}",
            f"{times[case['name']]['relative_time']:.2f}",
            f"{case['final_loss']:.4f}",
        ]
        for case in record["cases"]
        if "final_loss" in case
    ]
    about = f"{record['num_steps']:,} steps of {record['rows_per_step']} rows.\n\n"
    return about + _table(["model", "parameters", "FLOPs", "time of a step", "final loss"], rows)


def _why(case: Record) -> str:
    return str(case.get("note") or case.get("error") or case["outcome"])


TABLES: dict[str, Callable[[Record], str]] = {
    "export": _export,
    "generation": _generation,
    "momenta": _momenta,
    "gpu/checks": _checks,
    "gpu/layer": _layer,
    "gpu/model": _model,
    "gpu/training": _training,
}
