"""A whole block as one residual module; what is a block and what is a stack of them."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import rewire
from rewire.rewriting import plan_of

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = timm.create_model("test_vit", img_size=32, depth=3)
    return net, (torch.randn(2, 3, 32, 32),)


def swin() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Its blocks flatten the stream for the MLP and fold it again."""
    net = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        depths=(2, 2),
        embed_dim=8,
        num_heads=(1, 2),
        num_classes=3,
    )
    return net, (torch.randn(2, 3, 56, 56),)


def bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Post-norm: the block's last norm stays on the sum."""
    config = transformers.BertConfig(hidden_size=8, vocab_size=20, **SIZES)
    return transformers.BertModel(config, add_pooling_layer=False), (torch.randint(0, 20, (2, 5)),)


def t5() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Its block owns no add: each of its layers does."""
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2, vocab_size=20
    )
    return transformers.T5EncoderModel(config), (torch.randint(0, 20, (2, 5)),)


def resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Its blocks are one residual module each; a stage is a stack of them."""
    return timm.create_model("test_resnet", num_classes=3), (torch.randn(2, 3, 64, 64),)


def convnext() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return timm.create_model("test_convnext", num_classes=3), (torch.randn(2, 3, 64, 64),)


NETS = {"vit": vit, "swin": swin, "bert": bert, "t5": t5}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)"])
def test_a_block_is_half_as_many_modules(name: str, coupling: str) -> None:
    torch.manual_seed(0)
    net, inputs = NETS[name]()
    by_module = rewire.plan(net, inputs)
    rev = rewire.make_reversible(net, inputs, granularity="block", coupling=coupling)
    plan = plan_of(rev)
    assert [2 * len(chain) for chain in plan.chains] == [len(c) for c in by_module.chains]
    assert all(module.block for module in plan.modules)
    assert rewire.Plan.from_dict(plan.to_dict()) == plan
    verdict = rewire.verify(rev, *inputs, float64=True)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("make", [resnet, convnext])
def test_a_stack_is_no_block(make: object) -> None:
    net, inputs = make()  # type: ignore[operator]
    plans = [rewire.plan(net, inputs, granularity=g) for g in ("module", "block")]
    assert plans[0] == plans[1]


def test_with_the_identity_coupling_a_block_is_the_block() -> None:
    """Bdia in eval mode has γ = 0: x_{i+1} = x_i + (block(x_i) - x_i)."""
    net, inputs = vit()
    rev = rewire.make_reversible(net, inputs, granularity="block", coupling="bdia").eval()
    with torch.no_grad():
        assert torch.allclose(rev(*inputs), net.eval()(*inputs), atol=1e-4)


class Fed(nn.Module):
    """A block that two streams of the same size enter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, other: Tensor, x: Tensor) -> Tensor:
        x = x + self.first(x * other)
        return x + self.second(x)


class Feeding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Fed() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        other, x = self.stem(x).tanh(), x.sin()
        for block in self.blocks:
            x = block(other, x)
        return x


def test_the_stream_among_inputs_of_one_size() -> None:
    net, x = Feeding().double(), torch.randn(4, 8, dtype=torch.float64)
    rev = rewire.make_reversible(net, x, granularity="block", coupling="bdia").eval()
    assert torch.allclose(rev(x), net(x), atol=1e-12)
    verdict = rewire.verify(rev, x)
    assert verdict.passed, str(verdict)


def test_an_unknown_granularity() -> None:
    net, inputs = vit()
    with pytest.raises(ValueError, match="'module', 'block'"):
        rewire.plan(net, inputs, granularity="layer")
