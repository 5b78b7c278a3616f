"""The benchmark's rows: as lines to read, and in the file that keeps them."""
import json
from dataclasses import asdict
from pathlib import Path

from saelib import sweeps
from saelib.contestants import Setting
from saelib.files import write_whole

RESULTS = Path(__file__).parent / "rows" / "speed.jsonl"  # part of the package, so that an installed one can draw them


def text(rows: list[dict]) -> str:
    """The rows of one table as lines to read."""
    lines = [f"\n{rows[0]['table']}: " + ", ".join(f"{name} {value}" for name, value in rows[0]["setting"].items())]
    for row in rows:
        said = f"{row['case']:8} {row['name']:20}"
        if "failed" in row:
            said += f" failed: {row['failed']}"
        if "ms" in row:
            said += f" {row['ms']['median']:8.2f} ms [{row['ms']['q1']:7.2f}, {row['ms']['q3']:7.2f}]"
        if "ratio" in row:
            said += f" {row['ratio']['median']:6.3f} [{row['ratio']['q1']:5.3f}, {row['ratio']['q3']:5.3f}]"
        if "predicted_ms" in row:
            said += f"  predicted {row['predicted_ms']:.2f} ms by {row['bound']}"
        if "target" in row:
            said += f" {row['seconds'] or float('nan'):7.2f} s to {row['target']}; "
            said += f"{row['normalized_mse']:.4f} in the end"
        if "members" in row:
            said += f" {row['seconds']:.1f} s, after {row['seconds_to_open']:.1f} s to open the source"
        lines.append(said + (f"  ({row['differs']})" if row.get("differs") else ""))
    return "\n".join(lines)


def committed(table: str, setting: Setting | None = None, device: str = "cpu") -> list[dict]:
    """The rows of one table, at one setting if it has several, that `make bench` left here and that did not fail."""
    rows = [row for row in sweeps.read_rows(RESULTS) if row["table"] == table and "failed" not in row]
    return [row for row in rows if (row["setting"] == asdict(setting) if setting
                                    else row["setting"]["device"] == device)]


def identity(row: dict) -> tuple:
    """What a newer row replaces: the same table at the same setting."""
    return row["table"], row.get("axis"), json.dumps(row["setting"])


def store(rows: list[dict], path: Path) -> None:
    """Put rows into a file of JSON lines, in the place of older ones of the same tables and settings, all or none."""
    new = {identity(row) for row in rows}
    kept = [row for row in sweeps.read_rows(path) if identity(row) not in new] + rows
    write_whole({path: lambda partial: partial.write_text("".join(json.dumps(row) + "\n" for row in kept))})
