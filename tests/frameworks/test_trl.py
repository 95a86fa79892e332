"""TRL's trainers, which inherit the ``Trainer``, save and resume with the mixin as they do without."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    import datasets
    import peft
    from support.tiny_transformers import StopAt, bits, model, same

    from asyncckpt.integrations.transformers import AsyncCheckpointMixin

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

KINDS = ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a tokenizer on the disk: some of the trainers load a second copy from there."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    model().save_pretrained(folder)
    return folder


def made(kind: str, base: Path, folder: Path, *bases: type[Any], stop: int = 0) -> Any:
    """Make a trainer of TRL, with as many bases before it."""
    chosen = random.Random(1)

    def line(words: int) -> str:
        return " ".join(f"w{chosen.randrange(50)}" for _ in range(words))

    columns = {"SFT": ["text"], "DPO": ["prompt", "chosen", "rejected"], "Reward": ["chosen", "rejected"]}
    rows = [{name: line(5) for name in columns.get(kind, ["prompt"])} for _ in range(24)]
    more: dict[str, Any] = {}
    options: dict[str, Any] = {}
    transformers.set_seed(0)
    loaded = transformers.LlamaForCausalLM.from_pretrained(base)
    if kind == "KTO":
        rows = [{"prompt": line(5), "completion": line(5), "label": at % 2 == 0} for at in range(24)]
    if kind == "Reward":
        loaded.config.num_labels, loaded.config.pad_token_id = 1, 0
        loaded = transformers.AutoModelForSequenceClassification.from_config(loaded.config)
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **_: [float(len(set(text.split()))) for text in completions]
        options |= {"num_generations": 4, "max_completion_length": 4}
    if kind == "GRPO":
        options["use_adaptive_entropy"] = True
    if kind == "SFT":
        more["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    trainer = getattr(trl, f"{kind}Trainer")
    return type("Kind", (*bases, trainer), {})(
        model=loaded,
        args=getattr(trl, f"{kind}Config")(
            str(folder),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        callbacks=[StopAt(stop)] if stop else [],
        **more,
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO"])
def test_a_run_that_stopped_ends_as_the_plain_one_that_did_not(kind: str, base: Path, tmp_path: Path) -> None:
    unbroken = made(kind, base, tmp_path / "plain")
    unbroken.train()
    made(kind, base, tmp_path / "ours", AsyncCheckpointMixin, stop=5).train()
    resumed = made(kind, base, tmp_path / "ours", AsyncCheckpointMixin)
    resumed.train(resume_from_checkpoint=True)
    assert same(bits(resumed), bits(unbroken))
    assert [entry.step for entry in Run(tmp_path / "ours").ls()] == [2, 4, 6]
    assert (tmp_path / "ours" / "README.md").exists() == (tmp_path / "plain" / "README.md").exists()
    if kind == "GRPO":
        asset, file = (tmp_path / name / "checkpoint-6" / "entropy_ctrl_state.json" for name in ("ours", "plain"))
        assert json.loads(asset.read_text()) == json.loads(file.read_text())
        assert (resumed.entropy_coef, resumed._last_world_entropy) == (
            unbroken.entropy_coef,
            unbroken._last_world_entropy,
        )


def test_what_trls_trainers_add_to_a_checkpoint_is_known() -> None:
    """The mixin replaces these methods. A version of TRL that does more in them has to be read anew."""
    asked = ("_save_checkpoint", "_load_optimizer_and_scheduler", "_load_from_checkpoint", "_load_rng_state", "_save")
    card = {"args", "hub_model_id", "Path", "output_dir", "name", "split", "create_model_card", "super"}
    entropy = {"use_adaptive_entropy", "entropy_coef", "_last_world_entropy", "should_save", "PREFIX_CHECKPOINT_DIR"}
    entropy |= {"state", "global_step", "_get_output_dir", "os", "path", "join", "open", "json", "dump", "load"}
    entropy |= {"exists"}
    assert sorted(name.removesuffix("Trainer") for name in dir(trl) if name.endswith("Trainer")) == sorted(KINDS)
    for kind in KINDS:
        own = vars(getattr(trl, f"{kind}Trainer"))
        known = card | set(asked) | (entropy if kind == "GRPO" else set())
        for name in asked:
            if name in own:
                assert set(own[name].__code__.co_names) <= known, f"{kind}.{name}"
                assert name == "_save_checkpoint" or kind == "GRPO"
