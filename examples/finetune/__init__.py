"""What rewiring does to a pretrained network, and how fast finetuning brings it back.

    uv run python -m examples.finetune digits-vit --quick
    uv run python -m examples.finetune minilm --coupling re2 --coupling "dr2(0.9, 0.1)"
    uv run python -m examples.finetune --help

`loop.py` is the training loop, an ordinary one; `sweep.py` rewires, recalibrates, finetunes and
measures; `tasks/` are the networks with their data; `minimal.py` is a shorter example by itself.

Each seed draws the data and, where a task trains its own network, that network. All ways start
from the same weights and see the same batches at the same learning rate, the original too; a
network with BatchNorm is recalibrated before it is finetuned, the original too.
"""
