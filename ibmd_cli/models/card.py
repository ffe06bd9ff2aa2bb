"""Model cards: the README.md of a student's folder, with the front matter that the Hugging Face Hub reads.

A student is made of its teacher, so its licence is the teacher's: it stands in the front matter, in words, and in
`config.json`. Figures are those of `ibmd eval`, each with the protocol that makes it comparable.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibmd_cli.errors import UsageError
from ibmd_cli.files import read_json
from ibmd_cli.hub import parse_hf
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.interface import describe_tensors, sample_script
from ibmd_cli.models.model import Model, StudentModel
from ibmd_cli.models.published_teachers import published
from ibmd_cli.models.upload import push, repository
from ibmd_cli.reporting import counted, rounded

GRID = "grid.png"
HUB_LICENCES = {
    "apache-2.0": "",
    "bsd-3-clause": "",
    "cc-by-4.0": "Name its authors when you use it.",
    "cc-by-nc-4.0": "Name its authors when you use it. It is not for commercial use.",
    "cc-by-nc-sa-4.0": "Name its authors when you use it. It is not for commercial use, and what is made from it "
    "carries the same licence.",
    "cc-by-sa-4.0": "Name its authors when you use it. What is made from it carries the same licence.",
    "cc0-1.0": "",
    "mit": "",
}
"""Licences by the Hub's names (SPDX in lower case), and what a user should know of each."""


def student_card(
    student: StudentModel, *, reference: str = "FOLDER", results: Mapping[str, Any] | None = None, grid: bool = False
) -> str:
    """Return the model card of a student.

    Args:
        student: whose card.
        reference: what its examples name it by.
        results: of `ibmd eval`, see `read_results`.
        grid: whether there is a `grid.png` beside the card.
    """
    config, teacher = student.config, describe_teacher(student.config)
    licence, note = _licence(config["licence"])
    parts = [
        f"---\n{_front_matter(student, teacher, licence, results)}\n---\n\n# {student.name}",
        f"{config['task']}, in {counted(student.nfe, 'network evaluation')} per image. A student of {teacher['link']}, "
        "made by Inverse Bridge Matching Distillation ([arXiv:2502.01362](https://arxiv.org/abs/2502.01362)) "
        f"with ibmd {config['ibmd_version']}.",
        "**Nothing was learnt**: every update was skipped, so these are the weights that the training began with."
        if config["training"].get("untrained")
        else "",
        f"![Sources, teacher, student]({GRID})" if grid else "",
        _table(("", ""), _facts(student, teacher).items()),
        f"## Use\n\n{_examples(student, reference)}",
        f"## Without ibmd\n\n{_elsewhere(student, reference)}",
        f"## Figures\n\n{_figures(results)}" if results else "",
        f"## Licence\n\nThat of its teacher: {config['licence']}. {note}".rstrip(),
        f"## Settings\n\n{_table(('setting', 'value'), _code(config['training']).items())}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_results(file: Path, student: StudentModel) -> dict[str, Any]:
    """Read the `results.json` that `ibmd eval --out` wrote, and make sure that it is about this student.

    Raises:
        UsageError: it is no such file, or about other weights.
    """
    if not file.is_file():
        raise UsageError(f"--results {file}: no such file: expected the results.json of ibmd eval --out FOLDER")
    results = read_json(file)
    rows = results.get("rows")
    if not isinstance(rows, list) or results.get("schema") != 1 or not {"settings", "protocol"} <= results.keys():
        raise UsageError(f"--results {file}: not results of ibmd eval that this version reads (schema 1)")
    own = student.digest()
    measured = {row["sha256"] for row in rows if row["model"] == "student"}
    if own not in measured:
        found = ", ".join(sorted(digest[:12] for digest in measured)) or "none"
        raise UsageError(
            f"--results {file}: about another student (SHA-256 {found}; this one is {own[:12]}): "
            "measure this one: ibmd eval --student … --out FOLDER"
        )
    return {**results, "rows": [row for row in rows if row["model"] == "teacher" or row["sha256"] == own]}


def publish(
    reference: str, repo: str, *, results: Path | None = None, public: bool = False, dry_run: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Put a student on the Hugging Face Hub: its weights to the bit, its configuration, a card, and a picture.

    Args:
        reference: of the student.
        repo: OWNER/REPO.
        results: the `results.json` of `ibmd eval`, for the card's figures; a `grid.png` beside it is its picture.
        public: see `hub.push`.
        dry_run: only tell what would be pushed.
        quiet: show no progress.

    Returns:
        `url` of the repository (None if dry), `reference` under which the student is found there, `private` as asked
        for, `files` (`path` and `bytes` of each) and the text of the `card`.

    Raises:
        NotAvailable, IbmdError, UsageError: see `load_student`, `read_results` and `hub.push`.
    """
    repo = repository(repo)
    student = load_student(reference)
    files = published_files(student, f"hf://{repo}", results)
    card = files["README.md"]
    assert isinstance(card, bytes)
    sizes = {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size for path, content in files.items()
    }
    return {
        "schema": 1,
        "url": None if dry_run else push(files, repo, public=public, quiet=quiet),
        "reference": f"hf://{repo}",
        "private": not public,
        "files": [{"path": path, "bytes": size} for path, size in sizes.items()],
        "card": card.decode(),
    }


def published_files(student: StudentModel, reference: str, results: Path | None = None) -> dict[str, Path | bytes]:
    """Return what is published of a student: path in its repository → a file, or its content; see `publish`."""
    if student.weights is None:
        raise ValueError(f"{student.name}: its weights come from no file")
    figures = read_results(results, student) if results else None
    grid = results.with_name(GRID) if results else None
    picture = {GRID: grid} if grid and grid.is_file() else {}
    card = student_card(student, reference=reference, results=figures, grid=bool(picture))
    return {
        "README.md": card.encode(),
        "config.json": (json.dumps(student.config, indent=2, ensure_ascii=False) + "\n").encode(),
        "model.safetensors": student.weights,
        **picture,
    }


def teacher_card(teacher: Model) -> str:
    """Return the card of a teacher that `ibmd distill --teacher new` trained."""
    config, training = teacher.config, teacher.config["training"]
    facts = {
        "Bridge": ", ".join(f"{key} {value}" for key, value in config["bridge"].items()),
        "Network": f"{sum(p.numel() for p in teacher.predictor.parameters()):,} parameters, images of "
        f"{teacher.image_size}×{teacher.image_size} pixels",
        "Sampling": ", ".join(f"{key} {value}" for key, value in config["sampling"].items()),
    }
    return (
        f"# {teacher.name}\n\n{config['task']}: a diffusion bridge, trained on pairs by ibmd {config['ibmd_version']}. "
        f"Distil it: `ibmd distill --teacher FOLDER --data SOURCES`. Try it: `ibmd sample --teacher FOLDER -i X.png`."
        f"\n\n{_table(('', ''), facts.items())}\n\n## Licence\n\n{config['licence']}\n\n"
        f"## Settings\n\n{_table(('setting', 'value'), _code(training).items())}\n"
    )


# ---------------------------------------------------------------------------------------------------------- parts


def _front_matter(
    student: StudentModel, teacher: Mapping[str, Any], licence: Mapping[str, str], results: Mapping[str, Any] | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    names: dict[str, Any] = dict(licence)
    if teacher["repo"]:
        names |= {"base_model": teacher["repo"], "base_model_relation": "finetune"}
    if results:
        row = next(row for row in results["rows"] if row["model"] == "student")
        pairs = _data(results)
        names["model_name"] = student.name
        names["eval_results"] = [
            EvalResult(
                task_type="image-to-image", dataset_type=pairs, dataset_name=pairs, metric_type=name,
                metric_value=row[name]["value"], metric_args={"protocol": results["protocol"][name]},
            )
            for name in _scores(results)
        ]  # fmt: skip
    tags = ["ibmd", "diffusion-bridge", "distillation", "one-step" if student.nfe == 1 else "few-step"]
    data = ModelCardData(pipeline_tag="image-to-image", library_name="ibmd", tags=[*tags, "arxiv:2502.01362"], **names)
    return str(data.to_yaml())


def _licence(licence: str) -> tuple[dict[str, str], str]:
    """Return the Hub's keys for a licence, and a note for people."""
    if (name := licence.lower()) in HUB_LICENCES:
        return {"license": name}, HUB_LICENCES[name]
    note = "Ask the authors of the teacher before you use it or pass it on." if name.startswith("not stated") else ""
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name).strip("-")}, note


def describe_teacher(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return of a student's teacher a `link` (Markdown), its `repo` on the Hub if it has one, and its `data` if known.

    Args:
        config: the student's `config.json`.
    """
    reference = str(config["teacher"]["reference"])
    alias = reference.removeprefix("hub:") if reference.startswith("hub:") else config["training"].get("preset")
    if reference.startswith("builtin:"):
        return {"link": f"`{reference}`", "repo": None, "data": "OpenMoji 17 (https://openmoji.org)"}
    if reference.startswith("hf://"):
        repo = parse_hf(reference)[0]
        return {"link": f"[{repo}](https://huggingface.co/{repo})", "repo": repo, "data": None}
    if row := published().get(alias or ""):
        home = row.get("repo")
        page = f"https://huggingface.co/{home}" if home else row["url"]
        return {"link": f"[{row['title']}]({page}) (`hub:{alias}`)", "repo": home, "data": row["dataset"]}
    return {"link": f"`{Path(reference).name}`", "repo": None, "data": None}


def _facts(student: StudentModel, teacher: Mapping[str, Any]) -> dict[str, str]:
    config, side = student.config, student.image_size
    noise = student.setup.noise_shape
    drawn = f"z, {'×'.join(map(str, noise))} normal numbers: another z, another result" if noise else "no z"
    facts = {
        "Source": f"RGB image of {side // student.source_scale}×{side // student.source_scale} pixels"
        + (f", degraded as by `{config['degradation']}`" if config.get("degradation") else "")
        + (", and a mask of its hole" if config["mask"] else "")
        + (f", and a class, 0 … {config['classes'] - 1}" if config["classes"] else ""),
        "Result": f"RGB image of {side}×{side} pixels",
        "Randomness": drawn + (f", and the noise between its {student.nfe} steps" if student.nfe > 1 else ""),
        "Parameters": f"{sum(p.numel() for p in student.predictor.parameters()):,}",
        "Weights of the teacher": f"SHA-256 `{config['teacher']['sha256']}`",
    }
    return facts | ({"Data of the teacher": teacher["data"]} if teacher["data"] else {})


def _examples(student: StudentModel, reference: str) -> str:
    config, translate = student.config, f"ibmd sample --student {reference} --input"
    mask, hole = (" --mask HOLE.png", ', mask=Image.open("HOLE.png")') if config["mask"] else ("", "")
    label, index = (" --label 0", ", label=0") if config["classes"] else ("", "")
    commands = ["pip install ibmd-cli", f"{translate} SOURCE.png{mask}{label}"]
    if config.get("degradation"):
        commands.append(f"{translate} CLEAN.png --degrade {config['degradation']}{label}")
    python = [
        "from ibmd_cli import Student",
        "from PIL import Image",
        "",
        f'student = Student.from_pretrained("{reference}")',
        f'result = student(Image.open("SOURCE.png"){hole}{index})',
    ]
    return "```sh\n{}\n```\n\n```python\n{}\n```".format("\n".join(commands), "\n".join(python))


def _elsewhere(student: StudentModel, reference: str) -> str:
    """Say how the student runs with NumPy and ONNX Runtime alone."""
    script = sample_script(student)
    return (
        f"`ibmd export --student {reference} --output student.onnx` writes one file, which other programs run. Its "
        f"tensors:\n\n{_table(('tensor', 'meaning'), describe_tensors(student).items())}\n\n"
        f"These {len(script.splitlines())} lines make the picture that `ibmd sample` makes of an 8-bit sRGB image, "
        f"with the noise of the same seed and file name:\n\n```python\n{script}\n```"
    )


def _figures(results: Mapping[str, Any]) -> str:
    names, settings = _scores(results), results["settings"]
    rows = [
        (row["model"], row["nfe"], *(_interval(row.get(name)) for name in names), rounded(row["ms_per_image"]))
        for row in results["rows"]
    ]
    protocols = "\n".join(f"- `{name}`: {results['protocol'][name]}" for name in (*names, "ms_per_image"))
    known = any(row[name].get("low") is not None for row in results["rows"] for name in names if name in row)
    intervals = ", with 95 % intervals" if known else ", too few for intervals"
    return (
        f"By `ibmd eval` {results['ibmd_version']} on {counted(settings['images'], 'pair')} of {_data(results)}"
        f"{intervals}; times on {settings['device']}, {counted(settings['threads'], 'thread')}.\n\n"
        f"{_table(('model', 'evaluations', *names, 'ms/image'), rows)}\n\n{protocols}"
    )


def _data(results: Mapping[str, Any]) -> str:
    """Return what the pairs are called: an embedded set or the last part of a path."""
    return Path(results["settings"]["data"].removeprefix("builtin:")).name


def _scores(results: Mapping[str, Any]) -> list[str]:
    """List the scores of the student that have a protocol."""
    row = next(row for row in results["rows"] if row["model"] == "student")
    return [name for name, score in row.items() if isinstance(score, Mapping) and name in results["protocol"]]


def _interval(score: Mapping[str, float | None] | None) -> str:
    if score is None:
        return "–"
    low, high = score.get("low"), score.get("high")
    return f"{score['value']:.4g}" + (f" [{low:.4g}, {high:.4g}]" if None not in (low, high) else "")


def _code(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: f"`{value}`" for key, value in settings.items() if value not in ("", None)}


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
