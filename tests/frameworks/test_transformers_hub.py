"""What a trainer pushes to the Hub is whole, is what from_pretrained opens, and is nothing else."""

from __future__ import annotations

import fnmatch
import shutil
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import InvalidOption, Run, Safetensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from support.tiny_transformers import AsyncTrainer, StopAt, bits, model, same, trained, trainer

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


class FakeHub:
    """Is a repository that is a folder. Uploads wait for ``go``, as those of a slow network do."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.go = threading.Event()
        self.messages: list[str] = []
        self._threads = ThreadPoolExecutor(1)

    def create_repo(self, *_: Any, **__: Any) -> Any:
        return type("Url", (), {"repo_id": "me/tiny"})

    def upload_folder(self, *, run_as_future: bool = False, **given: Any) -> Any:
        pushed: Future[Any] = self._threads.submit(self._upload, **given)
        return pushed if run_as_future else pushed.result()

    def _upload(
        self,
        *,
        folder_path: str,
        commit_message: str,
        path_in_repo: str = "",
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        delete_patterns: list[str] | None = None,
        **_: Any,
    ) -> None:
        assert self.go.wait(60)
        source, into = Path(folder_path), self.repository / path_in_repo
        files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        files = {f for f in files if allow_patterns is None or _matches(f, allow_patterns)}
        files = {f for f in files if not _matches(f, ignore_patterns or [])}
        there = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
        for name in (f for f in there - files if _matches(f, delete_patterns or [])):
            (into / name).unlink()
        for name in files:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, into / name)
        self.messages.append(commit_message)

    def weights(self) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(self.repository).state_dict()

    def files(self) -> set[str]:
        return {str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "repository")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    monkeypatch.setattr("asyncckpt.integrations.hub._api", lambda: fake)
    fake.go.set()
    return fake


PUSHES: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_always_push": True}


def test_each_save_is_pushed_and_what_was_pushed_before_is_in_nobodys_way(hub: FakeHub, tmp_path: Path) -> None:
    first = trained(tmp_path / "run", **PUSHES, callbacks=[StopAt(6)])
    first._finish_current_push()
    assert same(hub.weights(), first.model.state_dict())
    first.push_to_hub()
    assert same(hub.weights(), first.model.state_dict())
    assert "model.safetensors" in hub.files(), "save_model gives the weights another name than a checkpoint has"
    resumed = trained(tmp_path / "run", **PUSHES, resume=True)
    resumed._finish_current_push()
    assert same(hub.weights(), resumed.model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumed.model.lm_head.weight, "data", resumed.model.lm_head.weight.data + 1)
        resumed.push_to_hub()
        assert same(hub.weights(), resumed.model.state_dict())
    assert {f for f in hub.files() if f.endswith((".safetensors", ".index.json"))} == {"model.safetensors"}
    assert not [f for f in hub.files() if f.startswith(".") or f in ("latest", "manifest.json", "trainer_state.json")]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_checkpoint_that_was_pushed_is_resumed_from_to_the_bit(strategy: str, hub: FakeHub, tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "plain", transformers.Trainer)
    trained(tmp_path / "run", **PUSHES, hub_strategy=strategy, callbacks=[StopAt(8)])._finish_current_push()
    pushed = hub.repository / ("last-checkpoint" if strategy == "checkpoint" else "checkpoint-6")
    resumed = trainer(str(tmp_path / "elsewhere"))
    resumed.train(resume_from_checkpoint=str(pushed))
    assert same(bits(resumed), bits(unbroken))


def slow(hub: FakeHub, steps: list[int]) -> type[Any]:
    """Make a trainer whose uploads begin when training ends; which steps are there then is noted in ``steps``."""

    class Slow(AsyncTrainer):
        def _finish_current_push(self) -> None:
            if not hub.go.is_set():
                steps.extend(entry.step for entry in Run(self.args.output_dir).ls())
                hub.go.set()
            super()._finish_current_push()

    hub.go.clear()
    return Slow


def test_retention_spares_what_is_being_pushed(hub: FakeHub, tmp_path: Path) -> None:
    steps: list[int] = []
    trained(tmp_path / "run", slow(hub, steps), **PUSHES, hub_strategy="all_checkpoints", save_total_limit=1)
    assert steps == [3, 6, 9, 12]
    assert all(Run(hub.repository).verify(step) == [] for step in (3, 6, 9, 12))
    trained(tmp_path / "run", **PUSHES, save_total_limit=1, max_steps=15, resume=True)._finish_current_push()
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [15]


def test_a_push_that_is_not_done_stands_for_those_after_it_as_with_the_plain_trainer(
    hub: FakeHub, tmp_path: Path
) -> None:
    trained(tmp_path / "run", slow(hub, []), **(PUSHES | {"hub_always_push": False}))
    assert hub.messages == ["Training in progress, step 3"]


def test_an_adapter_is_pushed_as_peft_opens_it(hub: FakeHub, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    one = trained(tmp_path / "run", of=adapted, **PUSHES, max_steps=3)
    one._finish_current_push()
    opened = peft.PeftModel.from_pretrained(model(), hub.repository)
    assert same(opened.state_dict(), one.model.state_dict())


@pytest.mark.parametrize(
    ("files", "adapter"),
    [("zarr", False), ("zarr", True), (Safetensors(codec="planes"), False)],
    ids=["zarr", "an adapter in zarr", "compressed"],
)
def test_what_nobody_could_open_is_not_pushed(files: Any, adapter: bool, hub: FakeHub, tmp_path: Path) -> None:
    class Chunked(AsyncTrainer):
        def checkpointer_options(self) -> dict[str, Any]:
            return {"files": files}

    def of() -> Any:
        peft = pytest.importorskip("peft")
        base = model(width=256)  # tensors too small to be compressed are stored as they are
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])) if adapter else base

    with pytest.raises(InvalidOption, match="hub_strategy='end'"):
        trained(tmp_path / "run", Chunked, **PUSHES, of=of())
    assert hub.files() == set()
    trained(tmp_path / "run", Chunked, **PUSHES, of=of(), hub_strategy="end", resume=True).push_to_hub()
    assert ("adapter_model.safetensors" if adapter else "model.safetensors") in hub.files()
