"""The outcome of a suite as text for people and as flat numbers for records."""

from collections.abc import Sequence

from vlmscope.conformance.record import Check
from vlmscope.conformance.suite import CaseReport


def render(reports: Sequence[CaseReport], own_dtype: str = "") -> str:
    """An aligned table, a row an identity, and below it what was skipped and why.

    Args:
        reports: a report a case.
        own_dtype: heads the column of errors outside float64; no such column when empty.
    """
    done = [report for report in reports if report.exact]
    head = ["identity", *(report.case for report in done), "tolerance", "holds", "seconds"]
    head += [f"in {own_dtype}"] * bool(own_dtype) + ["what it says"]
    lines = [head]
    for found in zip(*(report.exact for report in done), strict=True):
        first = found[0]
        cells = [first.name, *(_number(check.error) for check in found), _bound(first), _verdict(found)]
        cells.append(f"{sum(check.seconds for check in found):.1f}")
        if own_dtype:
            cells.append(_number(max((r.own[first.name] for r in done if first.name in r.own), default=None)))
        lines.append([*cells, first.claim])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *_notes(reports)])


def _notes(reports: Sequence[CaseReport]) -> list[str]:
    sizes = [f"{r.case}: {r.n_tokens} tokens, {r.n_features:,} active features, {r.seconds:.1f} s" for r in reports]
    notes = [
        size if report.exact else f"{report.case}: skipped, {report.reason}"
        for report, size in zip(reports, sizes, strict=True)
    ]
    for report in reports:
        notes += [f"{check.name}, {report.case}: skipped, {check.reason}" for check in report.exact if check.skipped]
    return notes


def _number(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.0f}" if error == 0 else f"{error:.1e}"


def _bound(check: Check) -> str:
    return f"{'>' if check.at_least else '<='} {check.tolerance:.0e}" if check.tolerance else "= 0"


def _verdict(found: Sequence[Check]) -> str:
    if any(check.failed for check in found):
        return "NO"
    return "skipped" if all(check.skipped for check in found) else "yes"


def failures(reports: Sequence[CaseReport]) -> list[str]:
    """A phrase for each identity that was measured and does not hold."""
    return [
        f"{check.name} on {report.case} ({_number(check.error)}, needs {_bound(check)})"
        for report in reports
        for check in report.exact
        if check.failed
    ]


def flat_metrics(reports: Sequence[CaseReport]) -> dict[str, float]:
    """`check/<case>/<identity>/error`, `.../seconds`, `.../error_own_dtype`, and the counts of all."""
    every = [check for report in reports for check in report.exact]
    metrics = {
        "check/held": float(sum(check.held for check in every)),
        "check/failed": float(sum(check.failed for check in every)),
        "check/skipped": float(sum(check.skipped for check in every)),
    }
    for report in reports:
        for check in report.exact:
            if check.error is not None:
                metrics[f"check/{report.case}/{check.name}/error"] = check.error
                metrics[f"check/{report.case}/{check.name}/seconds"] = check.seconds
        for name, error in report.own.items():
            metrics[f"check/{report.case}/{name}/error_own_dtype"] = error
        if report.exact:
            metrics[f"check/{report.case}/seconds"] = report.seconds
    return metrics
