"""Write what belongs beside quantized models in a folder as the Hugging Face hub has them: names and descriptions.

Such a folder has its models in `onnx/`. transformers.js tells the widths of a model apart by the ends of names, and
config.json says which files have external data. quantize_config.json says how each model was made, as the scripts of
transformers.js write it, and what was measured; README.md, the model card, shows that as a table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comq_onnx.model.files import HUB, data_names, write_text
from comq_onnx.options.options import Options
from comq_onnx.options.spelling import OPTIONS, differing
from comq_onnx.report.report import Report
from comq_onnx.report.several import least_agreement, worst_db
from comq_onnx.samples.model_folder import parse_json
from comq_onnx.solve.grid import MAX_BITS

CARD, QUANTIZED, CONFIG = "README.md", "quantize_config.json", "config.json"
# in config.json
OWN, EXTERNAL = "transformers.js_config", "use_external_data_format"
BEGIN, END = "<!-- comq-onnx: the next run replaces what follows -->", "<!-- comq-onnx: end -->"
# what names of variants have behind that of the float model
VARIANT = re.compile(r"_(fp16|int8|uint8|bnb4|quantized|q\d+(f16)?)$")
# what transformers.js calls widths, by the ends of names; others are opened by the name of the file
_DTYPES = {"quantized": "q8", **{f"q{bits}{half}": f"q{bits}{half}" for bits in (1, 2, 4) for half in ("", "f16")}}


@dataclass(frozen=True)
class Made:
    """Describe a model that was made: its place in the folder, and the report of its quantization."""

    place: Path
    report: Report


def ending(bits: int | None, half: bool = False) -> str:
    """Return what names of models of these bits have behind that of the float model.

    bits: None where they differ from layer to layer
    half: what stays float has half precision
    """
    return "quantized" if bits is None or bits == MAX_BITS else f"q{bits}{'f16' if half else ''}"


def is_of_hub(place: Path) -> bool:
    """Tell whether a model lies where the hub has it; place: in its folder."""
    return len(place.parts) > 1 and place.parts[0] == HUB


def describe(made: Sequence[Made], stage: Path, out: Path) -> None:
    """Write the descriptions of models into `stage`, where the models and copies of the source's files are.

    The model card gets a table where there is a card, or where models lie in `onnx/`; these get the other files too.
    out: the folder that all goes to, which may have descriptions of an earlier run: its models stay in them

    Raises OptionError where a file cannot be written.
    """
    of_hub = {one.place.relative_to(HUB): one for one in made if is_of_hub(one.place)}
    if not of_hub:
        _write_card({one.place.stem: _entry(one.report) for one in made}, "", stage, out)
        return
    models = {place.with_suffix("").as_posix(): _entry(one.report) for place, one in of_hub.items()}
    models = dict(sorted({**_entries_of(out), **models}.items()))
    last = list(of_hub.values())[-1].report
    write_text(stage / QUANTIZED, _to_json(_as_scripts_write(last, models)))
    _write_card(models, f"{HUB}/", stage, out)
    _tell_external([one.place for one in of_hub.values()], stage, out)


# quantize_config.json
# ----------------------------------------------------------------------------------------------------------------------


def _entries_of(out: Path) -> dict[str, Any]:
    """Return what quantize_config.json of an earlier run says of each model that is there, by name."""
    earlier = _read_json(out / QUANTIZED).get("per_model_config")
    known = earlier if isinstance(earlier, dict) else {}
    return {name: told for name, told in known.items() if (out / HUB / f"{name}.onnx").is_file()}


def _as_scripts_write(report: Report, models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of quantize_config.json: the options of the last run, and what is known of each model."""
    ends = [found[0][1:] for name in models if (found := VARIANT.search(name)) is not None]
    granularity = str(report.options.get("granularity") or "channel")
    return {
        "modes": sorted({_DTYPES.get(end, end) for end in ends}),
        "per_channel": granularity == "channel",
        "reduce_range": report.options.get("cpu") == "any",
        "block_size": int(granularity) if granularity.isdigit() else None,
        "is_symmetric": bool(report.options.get("symmetric", True)),
        "per_model_config": dict(models),
    }


def _entry(report: Report) -> dict[str, Any]:
    """Return what quantize_config.json says of one model: what of it is quantized, how, and what was measured."""
    lasting = {option.name for option in OPTIONS.values() if option.lasting}
    most = report.bits if isinstance(report.bits, (int, float)) else MAX_BITS
    return {
        "op_types": sorted({layer.op for layer in report.layers}),
        "weight_type": "QInt4" if most <= 4 else "QInt8",
        "comq_onnx": {
            "version": report.version,
            "options": {n: v for n, v in differing(Options(**report.options)).items() if n in lasting},
            "bits": report.bits,
            "synthetic_samples": report.samples.get("source") == "synthetic",
            "measured": _measured(report),
        },
    }


def _measured(report: Report) -> dict[str, Any]:
    """Return what was measured of a model; what was not is left out."""
    rise = report.language.rise if report.language is not None else None
    known = {
        "bytes_before": report.size.get("before"),
        "bytes_after": report.size.get("after"),
        "sqnr_db": _rounded(worst_db(report), 1),
        "top1_agreement": _rounded(least_agreement(report), 4),
        "perplexity_ratio": _rounded(rise, 4),
        "speed": _rounded(_ratio(report.latency_ms), 2),
        "speed_of_a_token": _rounded(_ratio(report.decoding_ms), 2),
        "onnxruntime": report.runtime.get("onnxruntime"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _ratio(milliseconds: Mapping[str, float]) -> float | None:
    return milliseconds["before"] / milliseconds["after"] if milliseconds else None


def _rounded(value: float | None, digits: int) -> float | None:
    """Round a number; JSON has none that is not finite."""
    return round(value, digits) if value is not None and math.isfinite(value) else None


# README.md
# ----------------------------------------------------------------------------------------------------------------------

_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "MB": lambda m: f"{m['bytes_before'] / 1e6:.2f} -> {m['bytes_after'] / 1e6:.2f}" if "bytes_after" in m else "",
    "SQNR dB": lambda m: f"{m['sqnr_db']:.1f}" if "sqnr_db" in m else "",
    "top-1 agreement": lambda m: f"{m['top1_agreement']:.1%}" if "top1_agreement" in m else "",
    "perplexity": lambda m: f"{m['perplexity_ratio']:.3f}x" if "perplexity_ratio" in m else "",
    "speed": lambda m: f"{m['speed']:.2f}x" if "speed" in m else "",
    "a token": lambda m: f"{m['speed_of_a_token']:.2f}x" if "speed_of_a_token" in m else "",
}


def _write_card(models: Mapping[str, Any], folder: str, stage: Path, out: Path) -> None:
    """Write the model card with its table: that in `out`, else that of the source, else a new one for a hub's folder.

    One that is no text stays as it is.
    """
    card = next((path for path in (out / CARD, stage / CARD) if path.is_file()), None)
    try:
        text = "" if card is None else card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if card is not None or folder:
        write_text(stage / CARD, with_section(text, _section(models, folder)))


def with_section(card: str, section: str) -> str:
    """Return a model card with the section in the place of that of an earlier run, or at its end."""
    whole = f"{BEGIN}\n\n{section}\n\n{END}\n"
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{whole}{after.removeprefix(chr(10))}"
    return f"{card.rstrip()}\n\n{whole}" if card.strip() else whole


def _section(models: Mapping[str, Any], folder: str) -> str:
    """Write the section of a model card; folder: the place of the models, in front of their names."""
    told = {name: model["comq_onnx"] for name, model in models.items() if _is_ours(model)}
    columns = {t: c for t, c in _COLUMNS.items() if any(c(one["measured"]) for one in told.values())}
    titles = ["model", "bits", *columns, *(["transformers.js"] if folder else [])]
    rows = [
        [f"`{folder}{name}.onnx`", str(one["bits"]), *(column(one["measured"]) for column in columns.values()),
         *([_opened(name)] if folder else [])]
        for name, one in told.items()
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *rows])
    said = (
        "Quantized with comq-onnx, and compared with the float model on samples that calibration did not see; speed is "
        "that over the float model, in one thread of ONNX Runtime on the machine that quantized."
    )
    made_up = [name for name, one in told.items() if one["synthetic_samples"]]
    if made_up:
        said += f" The samples of {', '.join(f'`{name}`' for name in made_up)} were made up."
    return f"## Quantized models\n\n{said}\n\n{table}"


def _is_ours(model: object) -> bool:
    """Tell whether an entry of quantize_config.json is one that this module wrote."""
    ours = model.get("comq_onnx") if isinstance(model, dict) else None
    return isinstance(ours, dict) and {"bits", "measured", "synthetic_samples"} <= ours.keys()


def _opened(name: str) -> str:
    """Return the options with which transformers.js opens a model."""
    found = VARIANT.search(name)
    dtype = _DTYPES.get(found[0][1:]) if found is not None else None
    return f'`dtype: "{dtype}"`' if dtype is not None else f'`model_file_name: "{name}", dtype: "fp32"`'


# config.json
# ----------------------------------------------------------------------------------------------------------------------


def _tell_external(made: Sequence[Path], stage: Path, out: Path) -> None:
    """Write into config.json which of the models have external data, where it would be wrong of them otherwise.

    A number there, or `true`, is said of all models of the folder, and the name of a model of all its widths.
    made: places of models
    """
    config = _read_json(stage / CONFIG) or _read_json(out / CONFIG)
    said = _own(config).get(EXTERNAL)
    files = {path.name: int(any((stage / path).with_name(n).is_file() for n in data_names(path))) for path in made}
    if not config or not (said or any(files.values())):
        return
    floats = sorted({VARIANT.sub("", path.stem) for path in made})
    general = said if isinstance(said, dict) else dict.fromkeys(floats, said or 0)
    earlier = _own(_read_json(out / CONFIG)).get(EXTERNAL)
    kept = {n: v for n, v in earlier.items() if n.endswith(".onnx")} if isinstance(earlier, dict) else {}
    own = {**_own(config), EXTERNAL: {**general, **kept, **files}}
    write_text(stage / CONFIG, _to_json({**config, OWN: own}))


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says to transformers.js alone."""
    own = config.get(OWN)
    return own if isinstance(own, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
