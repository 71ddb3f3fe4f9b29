"""Example inputs are found for nets of all kinds, and nothing is left behind."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from rewire.errors import CannotTrace
from rewire.inputs import Example, as_example, example_for

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
AUDIO = {**SMALL, "conv_dim": (16,) * 7}
DECISIONS = transformers.DecisionTransformerConfig(hidden_size=32, n_layer=1, n_head=2)
LLAMA = {**SMALL, "num_key_value_heads": 2, "vocab_size": 99}


def run(model: nn.Module, example: Example) -> Any:
    """A real run in training mode, which is what the example is for."""
    with torch.no_grad():
        return model.train()(*example.args, **example.kwargs)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", [2, 3, 224, 224]),
        ("swin_t", [2, 3, 224, 224]),
        ("fcn_resnet50", [2, 3, 224, 224]),
        ("r3d_18", [2, 3, 16, 224, 224]),
        ("swin3d_t", [2, 3, 16, 224, 224]),
        ("mvit_v1_b", [2, 3, 16, 224, 224]),
    ],
)
def test_torchvision(name: str, shape: list[int]) -> None:
    weights = {"weights_backbone": None} if name.startswith("fcn") else {}
    example = example_for(torchvision.models.get_model(name, weights=None, **weights))
    assert [list(tensor.shape) for tensor in example.args] == [shape]
    assert "from the first" not in example.description
    assert "(Conv" in example.description


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("vit_tiny_patch16_224", {}, [2, 3, 224, 224]),
        ("vit_tiny_patch16_224", {"img_size": 384}, [2, 3, 384, 384]),
        ("vit_tiny_patch16_224", {"img_size": 96, "in_chans": 1}, [2, 1, 96, 96]),
        ("resnet18", {"in_chans": 5}, [2, 5, 224, 224]),
        ("swin_tiny_patch4_window7_224", {}, [2, 3, 224, 224]),
        ("convnext_atto", {}, [2, 3, 224, 224]),
        ("levit_128s", {"features_only": True}, [2, 3, 224, 224]),
        ("tresnet_m", {}, [2, 3, 224, 224]),
        ("maxvit_rmlp_pico_rw_256", {}, [2, 3, 256, 256]),
    ],
)
def test_timm(name: str, options: dict[str, Any], shape: list[int]) -> None:
    example = example_for(timm.create_model(name, **options))
    assert [list(tensor.shape) for tensor in example.args] == [shape]


def test_large_timm_vit() -> None:
    model = timm.create_model("vit_large_patch16_224")
    example = example_for(model)
    assert example.description == "image [2, 3, 224, 224], from pretrained_cfg"


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        ("ViT", {**SMALL, "image_size": 30, "patch_size": 2}, {"pixel_values": [2, 3, 30, 30]}),
        ("VideoMAE", {**SMALL, "image_size": 32}, {"pixel_values": [2, 16, 3, 32, 32]}),
        ("Swin", {**SWIN, "image_size": 64}, {"pixel_values": [2, 3, 64, 64]}),
        ("ConvNext", {"depths": [1, 1, 1, 1]}, {"pixel_values": [2, 3, 224, 224]}),
        ("Yolos", {**SMALL, "image_size": [64, 96]}, {"pixel_values": [2, 3, 64, 96]}),
        ("GPT2", GPT2, {"input_ids": [2, 16]}),
        ("GPT2", {**GPT2, "n_positions": 12}, {"input_ids": [2, 6]}),
        ("Llama", LLAMA, {"input_ids": [2, 16]}),
        ("Bert", {**SMALL, "vocab_size": 99}, {"input_ids": [2, 16]}),
        ("Roberta", {**SMALL, "max_position_embeddings": 20}, {"input_ids": [2, 10]}),
        ("T5", T5, {"input_ids": [2, 16], "decoder_input_ids": [2, 16]}),
        ("Bart", SEQ2SEQ, {"input_ids": [2, 16], "decoder_input_ids": [2, 16]}),
        (
            "Whisper",
            {**SEQ2SEQ, "max_source_positions": 50, "pad_token_id": 0},
            {"input_features": [2, 80, 100], "decoder_input_ids": [2, 16]},
        ),
        ("Wav2Vec2", AUDIO, {"input_values": [2, 16000]}),
        ("AST", {**SMALL, "max_length": 64}, {"input_values": [2, 64, 128]}),
        (
            "CLIP",
            {"text_config": SMALL, "vision_config": {**SMALL, "image_size": 64}},
            {"input_ids": [2, 16], "pixel_values": [2, 3, 64, 64]},
        ),
        ("PatchTST", {"context_length": 24, "num_input_channels": 3}, {"past_values": [2, 24, 3]}),
        ("CLIPText", SMALL, {"input_ids": [2, 16]}),
        ("CLIPVision", {**SMALL, "image_size": 64}, {"pixel_values": [2, 3, 64, 64]}),
    ],
)
def test_transformers(name: str, options: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config)
    example = example_for(model)
    assert {name: list(tensor.shape) for name, tensor in example.kwargs.items()} == shapes
    assert example.description.endswith("from config")
    assert run(model, example) is not None


def test_a_classifier_that_takes_one_sentence_only() -> None:
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2))
    assert example_for(model).kwargs["input_ids"].shape == (1, 16)


class Positions(nn.Module):
    """Adds all of a learned table of positions, so only its length will do."""

    def __init__(self, first: nn.Module, length: int, width: int) -> None:
        super().__init__()
        self.first = first
        self.table = nn.Parameter(torch.zeros(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.table
        return y


class Unfold(nn.Module):
    """A linear layer on patches of an image: no layer says that it takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))
        return y


class Values(nn.Module):
    """Asks for a value, which a fake tensor has not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if x.sum().item() > 1e9 else -y


class Both(nn.Module):
    """Cannot do without a picture and a text, in an order that its layers do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.patches = nn.Conv2d(3, 8, 4, 4)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        seen = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([seen, self.table(input_ids)], dim=1)


class Timed(nn.Module):
    """Says only when it runs that it wants a time too."""

    def __init__(self, name: str = "timestep") -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.name = name

    def forward(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        if timestep is None:
            raise ValueError(f"You have to specify `{self.name}`.")
        y: Tensor = self.conv(sample) * timestep.cos().view(-1, 1, 1, 1)
        return y


class Prompted(nn.Module):
    """Has a config and a main input, and cannot do without another one."""

    main_input_name: str | list[str] = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=12, num_channels=2)
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, prompt_pixel_values: Tensor, pixel_values: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.cat([prompt_pixel_values, pixel_values], dim=1))
        return y


def test_several_required_inputs_are_told_by_their_names() -> None:
    model = Both()
    image, ids = example_for(model).args
    assert (list(image.shape), list(ids.shape)) == ([2, 3, 224, 224], [2, 16])
    assert (image.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert run(model, example_for(model)) is not None


@pytest.mark.parametrize("main", ["pixel_values", ["pixel_values", "prompt_pixel_values"]])
def test_required_inputs_beside_the_main_one(main: Any) -> None:
    model = Prompted()
    model.main_input_name = main
    shapes = {name: list(tensor.shape) for name, tensor in example_for(model).kwargs.items()}
    assert shapes == {"prompt_pixel_values": [2, 2, 12, 12], "pixel_values": [2, 2, 12, 12]}
    assert run(model, example_for(model)) is not None


def test_what_the_error_asks_for_is_given() -> None:
    example = example_for(Timed())
    assert [list(tensor.shape) for tensor in example.args] == [[2, 4, 224, 224]]
    assert {name: list(tensor.shape) for name, tensor in example.kwargs.items()} == {
        "timestep": [2]
    }
    assert run(Timed(), example) is not None


PLAIN: list[tuple[nn.Module, list[list[int]]]] = [
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)), [[2, 1, 28, 28]]),
    (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 3)), [[2, 3, 32, 32]]),
    (nn.Conv3d(3, 2, 3), [[2, 3, 16, 224, 224]]),
    (nn.Conv1d(7, 2, 3), [[2, 7, 64]]),
    (nn.Linear(7, 2), [[2, 16, 7]]),
    (nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2)), [[2, 7]]),
    (nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 2)), [[2, 16, 7]]),
    (nn.LSTM(7, 3, batch_first=True), [[2, 16, 7]]),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [[2, 16, 8]]),
    (nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), [[2, 16, 8]] * 2),
    (nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8)), [[2, 16]]),
    (Positions(nn.Embedding(20, 8), 13, 8), [[2, 13]]),
    (Positions(nn.Linear(5, 8), 16, 8), [[2, 16, 5]]),
    (Positions(nn.Linear(8, 8), 11, 8), [[2, 11, 8]]),
    (Unfold(), [[2, 3, 224, 224]]),
    (Values(), [[2, 16, 6]]),
]


@pytest.mark.parametrize(("model", "shapes"), PLAIN, ids=lambda value: type(value).__name__)
def test_plain_modules(model: nn.Module, shapes: list[list[int]]) -> None:
    example = example_for(model)
    assert [list(tensor.shape) for tensor in example.args] == shapes
    assert run(model, example) is not None


def test_ids_stay_inside_the_vocabulary_and_off_special_ids() -> None:
    config = transformers.GPT2Config(**{**GPT2, "vocab_size": 5}, bos_token_id=0, eos_token_id=3)
    ids = example_for(transformers.GPT2Model(config)).kwargs["input_ids"]
    assert ids.dtype == torch.int64
    assert set(ids.flatten().tolist()) == {1, 2, 4}


def test_given_shape() -> None:
    image = example_for(nn.Conv2d(4, 2, 3), shape=[1, 4, 9, 7])
    assert [list(tensor.shape) for tensor in image.args] == [[1, 4, 9, 7]]
    assert image.description == "tensor [1, 4, 9, 7], from the given shape"
    ids = example_for(nn.Embedding(9, 2), shape=(3, 5)).args[0]
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (3, 5))
    assert ids.max() < 9


def test_same_example_each_time() -> None:
    first, second = example_for(nn.Linear(3, 3)), example_for(nn.Linear(3, 3))
    assert torch.equal(first.args[0], second.args[0])
    assert first.args[0].std() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    assert example_for(nn.Linear(3, 3).to(dtype)).args[0].dtype == dtype


def test_meta_model_gives_meta_tensors() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    assert example_for(model).args[0].is_meta


class Marks(nn.Module):
    """Leaves marks wherever it can, then accepts the input or not."""

    calls: list[int]

    def __init__(self, accepts: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).eval()
        self.accepts = accepts
        self.calls = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        self.cache = x
        self.count = self.count + 1
        numpy.random.rand()
        y: Tensor = self.norm(x) + torch.rand(()) + random.random()
        if not self.accepts or x.sum().item() == 0:
            raise ValueError("no\nnot at all")
        return y


@pytest.mark.parametrize("accepts", [True, False])
def test_nothing_is_left_behind(accepts: bool) -> None:
    model = Marks(accepts).train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = set(vars(model))
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    if accepts:
        assert example_for(model).args[0].shape == (2, 4)
    else:
        with pytest.raises(CannotTrace):
            example_for(model)
    assert (model.training, model.norm.training) == (True, False)
    assert set(vars(model)) == names
    assert model.calls == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()


def test_failure_says_what_was_tried_and_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 7), nn.Linear(9, 5))
    with pytest.raises(CannotTrace, match=r"Sequential.* none of \d+ inputs") as caught:
        example_for(model)
    message = str(caught.value)
    assert "features [2, 16, 8], from 0 (Linear)" in message
    assert "example_inputs=" in message
    assert "--input-shape" in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_failure_names_the_arguments_in_a_line_to_paste() -> None:
    with pytest.raises(CannotTrace) as caught:
        example_for(Timed("more"))
    assert str(caught.value).endswith('such as rewire.plan(model, {"sample": ...}).')
    with pytest.raises(CannotTrace) as caught:
        example_for(transformers.DecisionTransformerModel(DECISIONS))
    assert 'rewire.plan(model, {"states": ...' in str(caught.value)


def test_a_users_example_in_one_form() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert as_example(x) == Example((x,))
    assert as_example((x, None)) == as_example([x, None]) == Example((x, None))
    assert as_example({"x": x, "y": y}).kwargs == {"x": x, "y": y}
    example = Example((x,), {"y": y}, "mine")
    assert as_example(example) is example
    with pytest.raises(CannotTrace, match="got int, expected a tensor"):
        as_example(3)
