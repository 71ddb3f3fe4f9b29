"""What users of transformers and accelerate do with a model, done with a rewired one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.rewriting import is_rewired
from rewire.tape import watch_repeats
from tests.exactness import as_found, assert_as_stored, assert_same_bits, some
from tests.test_habits_timm import assert_close, assert_exact, stepping

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24}
MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
LEARN = transformers.AutoModelForCausalLM
CLASSIFY = transformers.AutoModelForSequenceClassification
SEE = transformers.AutoModelForImageClassification
TRANSLATE = transformers.AutoModelForSeq2SeqLM
MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llama": (LEARN, lambda: transformers.LlamaConfig(**SIZES, **MARKS)),
    "gpt2": (
        LEARN,
        lambda: transformers.GPT2Config(vocab_size=40, n_layer=2, n_head=2, n_embd=16, **MARKS),
    ),
    "bert": (CLASSIFY, lambda: transformers.BertConfig(**SIZES, pad_token_id=0)),
    "t5": (
        TRANSLATE,
        lambda: transformers.T5Config(
            **T5, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0
        ),
    ),
    "vit": (
        SEE,
        lambda: transformers.ViTConfig(
            **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=4
        ),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """No progress bars, no advice."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


def made(name: str) -> Any:
    """A small random model in train mode, the same one each time; attention by softmax."""
    torch.manual_seed(0)
    family, config = MODELS[name]
    return family.from_config(config(), attn_implementation="eager").train()


def inputs(name: str) -> dict[str, Tensor]:
    """A batch of two, the first one padded, with labels."""
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        pictures = torch.randn(2, 3, 16, 16, generator=draw)
        return {"pixel_values": pictures, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 40, (2, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = torch.tensor([0, 1]) if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def in_float64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@functools.cache
def planned(name: str) -> rewire.Plan:
    return rewire.plan(made(name), inputs(name))


def rewired(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    """A rewired model that has not run yet."""
    model = made(name) if model is None else model
    return rewire.make_reversible(model, plan=planned(name), check="raise", **options)


def loss_of(batch: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    return lambda model: model(**batch).loss


def test_plans_of_these_models() -> None:
    """So that the tests below test something."""
    lengths = {name: [len(chain) for chain in planned(name).chains] for name in MODELS}
    assert lengths == {"llama": [4], "gpt2": [4], "bert": [4], "t5": [4, 6], "vit": [4]}


# ---- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_saved_directory_is_the_originals(name: str, tmp_path: Path) -> None:
    model = made(name)
    rev = rewired(name, model).eval()
    rev.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert type(back) is type(model)
    assert back.config.architectures == [type(model).__name__]
    pairs = zip(back.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(key == other and torch.equal(a, b) for (key, a), (other, b) in pairs)
    again = rewired(name, back).eval()
    batch = inputs(name)
    assert torch.equal(again(**batch).logits, rev(**batch).logits)
    assert_exact(again.train(), loss_of(batch))


class Looped(transformers.PreTrainedModel):
    """The residual loop stands in the code of the model itself."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def test_the_class_of_a_rewired_model_makes_originals(tmp_path: Path) -> None:
    model, x = Looped(transformers.PretrainedConfig()), torch.randn(2, 8)
    rev = rewire.make_reversible(model, x)
    rev.save_pretrained(tmp_path)
    back = type(rev).from_pretrained(tmp_path)
    assert not is_rewired(back)
    assert torch.equal(back(x), model.eval()(x))


# ---- outputs -----------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@some("name", ["llama", "bert", "t5", "vit"], slow=["t5"])
def test_everything_that_can_be_asked_for(name: str, asked: str) -> None:
    """Losses on all of it; under (1, 0, 1) all of it is the original's."""
    batch = inputs(name)
    assert_exact(rewired(name), lambda m: m(**batch, **{asked: True}))
    model, batch = made(name).double(), in_float64(batch)
    rev = rewired(name, model, coupling=AsOriginal())
    found, expected = (m(**batch, **{asked: True}) for m in (rev, model))
    assert list(found) == list(expected)
    assert any(key.endswith(asked.removeprefix("output_")) for key in found)
    assert_close(rev, model, lambda m: m(**batch, **{asked: True}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate(name: str) -> None:
    """With a cache as without; under (1, 0, 1) as the original, by beams too."""
    model, batch = made(name).eval(), inputs(name)
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [2]}
    rev = rewired(name, model)
    found = rev.generate(**batch, **settings)
    assert found.shape[1] >= 7
    assert torch.equal(found, rev.generate(**batch, **settings, use_cache=False))
    same = rewired(name, model, coupling=AsOriginal())
    for beams in (1, 2):
        found, expected = (m.generate(**batch, **settings, num_beams=beams) for m in (same, model))
        assert torch.equal(found, expected)


# ---- checkpointing -----------------------------------------------------------------------


def checkpointing(name: str, when: str, *, reentrant: bool = False) -> Any:
    """A rewired model, with checkpointing turned on in the original or in itself."""
    model, settings = made(name), {"use_reentrant": reentrant}
    if when == "before":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        rev = rewire.make_reversible(model, inputs(name), check="raise")
    else:
        rev = rewired(name, model)
        rev.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    if reentrant:
        rev.enable_input_require_grads()
    return rev


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("llama", "after"),
        ("bert", "after"),
        pytest.param("t5", "after", marks=pytest.mark.slow),
        ("t5", "before"),
        ("llama", "before"),
        ("vit", "before"),
    ],
)
def test_checkpointing_changes_no_bit(name: str, when: str) -> None:
    """In the first run, in a later one, and turned off again."""
    rev = checkpointing(name, when)
    step = stepping(rev, loss_of(inputs(name)))
    expected = stepping(rewired(name), loss_of(inputs(name)))()
    for _ in range(2):
        with as_found(rev):
            assert_same_bits(step(), expected)
    rev.activation_checkpointing_disable()
    assert_same_bits(step(), expected)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_reentrant_checkpointing_of_layers_is_refused(name: str) -> None:
    rev = checkpointing(name, "after", reentrant=True)
    with pytest.raises(rewire.RewireError, match="use_reentrant=False"):
        loss_of(inputs(name))(rev).backward()


# ---- trainers ----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen random sequences to be learnt by heart."""

    def __init__(self) -> None:
        self.rows = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[number], "labels": self.rows[number]}


def trained(rev: Any, folder: Path, **options: Any) -> tuple[list[float], list[Tensor]]:
    """Losses and weights after twenty steps of a Trainer."""
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=1,
        **options,
    )
    trainer = transformers.Trainer(rev, arguments, train_dataset=Rows())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, [parameter.detach().clone() for parameter in rev.parameters()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"bf16": True}),
        pytest.param("gpt2", {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "bf16", "accumulated"],
)
def test_a_trainer(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Twenty steps learn, and leave the bits that plain autograd leaves."""
    losses, found = trained(rewired(name), tmp_path, **options)
    assert losses[-1] < losses[0] - 0.2
    rev = rewired(name)
    with rewire.store_activations(rev):
        stored, expected = trained(rev, tmp_path, **options)
    assert losses == stored
    assert_same_bits(found, expected)


def test_a_trainer_that_checkpoints(tmp_path: Path) -> None:
    _, expected = trained(rewired("llama"), tmp_path)
    _, found = trained(rewired("llama"), tmp_path, gradient_checkpointing=True)
    assert_same_bits(found, expected)


@pytest.fixture
def accelerators() -> Iterator[Any]:
    """The class; the state that all its instances share is as new, before and after."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("first", ["rewired", "prepared"])
def test_an_accelerator(accelerators: Any, first: str, precision: str) -> None:
    """It replaces `forward` on the instance; what it gives back can be rewired, too."""
    accelerator, batch = accelerators(cpu=True, mixed_precision=precision), inputs("llama")
    if first == "rewired":
        rev = rewired("llama")
        prepared = accelerator.prepare(rev)
        assert accelerator.unwrap_model(prepared) is rev
    else:
        prepared = rev = rewired("llama", accelerator.prepare(made("llama")))

    def step() -> list[Tensor]:
        prepared.zero_grad()
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        return [loss.detach(), *(parameter.grad.clone() for parameter in rev.parameters())]

    assert_as_stored(rev, step)
    with watch_repeats() as seen:
        prepared(**batch)
    assert len(seen) == 4
