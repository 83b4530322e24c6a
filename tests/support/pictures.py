"""Made pictures that are as different from each other as photographs are."""

import numpy as np
from PIL import Image


def scene(seed: int, size: int = 96) -> Image.Image:
    """A picture whose contrast falls with frequency, as that of photographs does."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.fft2(rng.normal(size=(size, size, 3)), axes=(0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))[..., None]
    pixels = np.fft.ifft2(spectrum / np.maximum(frequency, 1 / size), axes=(0, 1)).real
    return Image.fromarray((128 + 45 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))
