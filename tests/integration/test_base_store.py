"""Quantize once: several processes, damage, no pickles, GGUF."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from orchestrator.config import ModelConfig, QuantizationConfig
from orchestrator.errors import ModelError
from orchestrator.model import base, source, store

ENSURE = """
import sys, json, torch
from pathlib import Path
from orchestrator.config import ModelConfig, QuantizationConfig
from orchestrator.model import source, store
cache = Path(sys.argv[2])
said = []
origin = source.locate(ModelConfig(base=sys.argv[1]), cache)
entry = store.ensure(origin, QuantizationConfig(), torch.float32, cache / "bases", said.append)
print(json.dumps([str(entry), len(said)]))
"""


def _ensure(model: Path, cache: Path, **settings: object) -> Path:
    origin = source.locate(ModelConfig(base=str(model)), cache)
    quantization = QuantizationConfig(**settings)
    return store.ensure(origin, quantization, torch.float32, cache / "bases", lambda _: None)


def test_many_processes_quantize_once(chat_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENSURE, str(chat_model), str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=200)[0]) for process in started]
    assert len({entry for entry, _ in answers}) == 1
    assert sum(said for _, said in answers) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_machines_that_share_one_base_at_once_share_a_whole_one(
    chat_model: Path, tmp_path: Path, damaged: bool
) -> None:
    entry = _ensure(chat_model, tmp_path)
    whole = {path.name: path.read_bytes() for path in entry.iterdir()}
    together = threading.Barrier(8)

    def put(shared: store.SharedFolder) -> None:
        together.wait(timeout=60)
        shared.put(entry)

    with ThreadPoolExecutor(8) as machines:
        # Often, for one that looks while another one renames is rare.
        for turn in range(60):
            folder = tmp_path / f"shared-{turn}"
            if damaged:
                shutil.copytree(entry, folder / entry.name)
                (folder / entry.name / "config.json").unlink()
            list(machines.map(put, [store.SharedFolder(folder)] * 8))
            assert [path.name for path in folder.iterdir()] == [entry.name]
            shared = {path.name: path.read_bytes() for path in (folder / entry.name).iterdir()}
            assert shared == whole
            shutil.rmtree(folder)


def test_what_a_killed_process_left_beside_a_base_goes(chat_model: Path, tmp_path: Path) -> None:
    entry = _ensure(chat_model, tmp_path)
    places = (entry.parent, tmp_path / "shared")
    old, new = ([place / f".{entry.name}-{age}" for place in places] for age in ("old", "new"))
    for folder in (*old, *new):
        (folder / "dense").mkdir(parents=True)
    for folder in old:
        os.utime(folder, (1, 1))
    store.SharedFolder(places[1]).put(entry)
    (entry / "config.json").unlink()
    assert _ensure(chat_model, tmp_path) == entry and (entry / "config.json").exists()
    assert not any(folder.exists() for folder in old)
    # What is new may be another machine's, at work.
    assert all(folder.exists() for folder in new)


def test_a_shared_base_is_fetched_whole(chat_model: Path, tmp_path: Path) -> None:
    entry, shared = _ensure(chat_model, tmp_path), store.SharedFolder(tmp_path / "shared")
    shared.put(entry)
    another = tmp_path / "another" / entry.name
    shared.fetch(another)
    assert {path.name: path.read_bytes() for path in another.iterdir()} == {
        path.name: path.read_bytes() for path in entry.iterdir()
    }


def test_entries_differ_by_what_they_hold(chat_model: Path, tmp_path: Path) -> None:
    entries = {
        _ensure(chat_model, tmp_path),
        _ensure(chat_model, tmp_path, type="fp4"),
        _ensure(chat_model, tmp_path, double_quant=False),
        _ensure(chat_model, tmp_path, type="none"),
    }
    assert len(entries) == 4
    assert _ensure(chat_model, tmp_path) in entries


def test_the_sixteen_bit_weights_are_not_needed_again(chat_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat_model, model)
    entry = _ensure(model, tmp_path)
    shutil.rmtree(model)
    loaded = base.load(entry, torch.device("cpu"))
    layer = loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
    assert base.load_tokenizer(entry).chat_template
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_damaged_entry_is_made_again(chat_model: Path, tmp_path: Path) -> None:
    entry = _ensure(chat_model, tmp_path)
    weights = entry / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    assert _ensure(chat_model, tmp_path) == entry
    assert weights.stat().st_size == size


def test_a_model_says_how_long_a_row_may_be(chat_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(base=str(chat_model))
    said = json.loads((chat_model / "config.json").read_text())["max_position_embeddings"]
    entry = _ensure(chat_model, tmp_path)
    assert source.longest_row(chat_model, config) == source.longest_row(entry, config) == said
    assert source.longest_row(tmp_path, config) is None


def test_pickles_are_refused(tmp_path: Path, chat_model: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((chat_model / "config.json").read_text())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors.*pytorch_model\.bin"):
        source.locate(ModelConfig(base=str(folder)), tmp_path)


def test_code_of_a_model_does_not_run_unasked(tmp_path: Path, chat_model: Path) -> None:
    folder, mark = tmp_path / "custom", tmp_path / "ran"
    shutil.copytree(chat_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass OwnConfig: pass\n")
    with pytest.raises(ModelError):
        _ensure(folder, tmp_path)
    assert not mark.exists()


def test_missing_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "modle").mkdir()
    with pytest.raises(ModelError, match="did you mean"):
        source.locate(ModelConfig(base=str(tmp_path / "model")), tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        source.locate(ModelConfig(base=str(tmp_path / "modle")), tmp_path)
