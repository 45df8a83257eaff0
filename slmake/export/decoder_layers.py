"""Run a transformers model one decoder layer at a time, so that one layer's weights are in memory, not the model's.

The model's own code makes each layer's arguments (masks, positions, rotary embeddings): every pass goes through the whole
model, but all layers except the active one give back what they get.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from slmake import memory


class DecoderLayers:
    """A model's decoder layers, computed in float32 on `device`.

    Args:
        network: a causal language model whose weights transformers has mapped from their files.
        scratch: folder for the states between two layers, one file per batch.
    """

    def __init__(self, network, device: torch.device, scratch: Path):
        self.decoder, self.device, self.scratch = network.get_decoder(), device, scratch
        self.layers = list(self.decoder.layers)
        self.active: int | None = None  # None: the embedding, whose output is the first layer's input
        self.states: torch.Tensor | None = None
        inside = {id(value) for module in (*self.layers, self._embedding) for value in module.parameters()}
        for value in (*self.decoder.parameters(), *self.decoder.buffers()):
            if id(value) not in inside:  # the last norm, and what rotary embeddings are made of
                value.data = value.data.to(device, torch.float32) if value.is_floating_point() else value.to(device)
        for index, layer in enumerate(self.layers):
            layer.forward = self._only_active(index, layer.forward)

    @property
    def _embedding(self) -> torch.nn.Module:
        return self.decoder.get_input_embeddings()

    def _only_active(self, index: int, forward):
        def run(states, *arguments, **options):
            if self.active is None and index == 0:
                self.states = states
            elif self.active == index:
                self.states = forward(self.states, *arguments, **options)
            return states

        return run

    @contextlib.contextmanager
    def loaded(self, index: int | None) -> Iterator[torch.nn.Module]:
        """A layer (None: the embedding) with its weights in float32, ready to `run`."""
        module = self._embedding if index is None else self.layers[index]
        before = {value: value.data for value in module.parameters()}
        for value, data in before.items():
            value.data = data.to(self.device, torch.float32)
        self.active = index
        yield module
        for value, data in before.items():
            value.data = data
        memory.release(before.values())

    def run(self, batch: int, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Replace a batch's states by the loaded layer's output.

        Args:
            batch: the batch's number.
            ids: int64 [rows, time] token ids.
            mask: bool [rows, time], false for padding.
        """
        inputs = {"input_ids": ids}
        if self.active is not None:
            self.states = self.states_of(batch).to(self.device)
            inputs = {"inputs_embeds": self.states}
        self.decoder(**inputs, attention_mask=mask.long(), use_cache=False)
        np.save(self._file(batch), self.states.cpu().numpy())

    def states_of(self, batch: int) -> torch.Tensor:
        """float32 [rows, time, width]: a batch's output of the last layer that ran."""
        return torch.from_numpy(np.load(self._file(batch)))

    def _file(self, batch: int) -> Path:
        return self.scratch / f"states-{batch}.npy"
