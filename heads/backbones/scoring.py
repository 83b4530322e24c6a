"""Score of an encoder on the fold that is held out from it."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from featcache.backbone.network import Backbone
from featcache.machine.device import pinned, to_device, to_host
from featcache.machine.prefetch import prefetch
from heads.backbones.batches import Images, pairs_of
from heads.backbones.encoder import Encoder
from heads.scores.metrics import VertexScores, pearson_r, summarize

_PREFETCHED = 2  # batches whose images are read before they are asked for


@dataclass(frozen=True)
class HeldOut:
    """The held-out images of a training, and how they are read.

    backbone : what the encoder's backbone was made from, for its transform
    batch_size : images a pass; sums inside a network depend on it in their last bits
    """

    images: Images
    backbone: Backbone
    batch_size: int
    accelerator: Accelerator

    def score(self, encoder: Encoder) -> float:
        """The challenge's metric of the held-out fold as a fraction, or mean r where there are no noise ceilings.

        It is over the vertices of all subjects together. Processes share the images.
        """
        scores = []
        for number, (subject, rows) in enumerate(zip(self.images.subjects, self.images.held_out, strict=True)):
            share = np.array_split(rows, self.accelerator.num_processes)[self.accelerator.process_index]
            predicted = self.predict(encoder, number, share)
            for surface in subject.surfaces:
                predictions = np.concatenate(gather_object([predicted[surface]]))
                r = pearson_r(predictions, subject.responses(surface)[rows])
                scores.append(VertexScores(subject.name, surface, r, subject.noise_ceiling[surface]))
        overall = summarize(scores)[-1]
        return overall.mean_r if overall.accuracy is None else overall.accuracy / 100

    @torch.no_grad()
    def predict(self, encoder: Encoder, number: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Predictions of one subject's images, {surface: (len(rows), n_vertices)}, by the encoder in evaluation."""
        encoder.eval()
        device, subject = self.accelerator.device, self.images.subjects[number]
        heads = {surface: encoder.heads.surfaces[subject.name, surface].to(device) for surface in subject.surfaces}
        predicted = {surface: [torch.empty(0, n, device=device)] for surface, n in subject.n_vertices.items()}
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        for pixels in prefetch(partial(self._read, number), batches, _PREFETCHED):
            images = self.backbone.normalise(to_device(pixels, device))
            with self.accelerator.autocast():  # of a mean of the weights, too, which accelerate did not prepare
                outputs = encoder(images, torch.full((len(pixels),), number)).float()
            for surface, surface_outputs in heads.items():
                predicted[surface].append(surface_outputs.mean(outputs))
        whole = to_host([torch.cat(parts) for parts in predicted.values()])  # one wait for all
        return {surface: values.numpy() for surface, values in zip(predicted, whole(), strict=True)}

    def _read(self, number: int, rows: np.ndarray) -> torch.Tensor:
        return pinned(self.images.read(pairs_of(number, rows)), self.accelerator.device)
