"""Distances between sets of pictures. All take uint8 [N, 64, 64, 3] or features [N, D]; NumPy, float64."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to two sets of features [N, D] (Heusel et al. 2017).

    In units of the second set's total variance.
    """
    mean, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), and the latter is symmetric.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float((mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross) / np.trace(cov_b))


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean radial power spectrum of the luminance, [32] for frequencies 0.5..31.5 cycles a picture."""
    grey = images.astype(np.float64) @ (0.299, 0.587, 0.114)
    window = np.hanning(grey.shape[1])[:, None] * np.hanning(grey.shape[2])[None, :]
    grey = (grey - grey.mean((1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(grey)) ** 2).mean(0)
    frequency = np.fft.fftfreq(grey.shape[1]) * grey.shape[1]
    radius = np.hypot(frequency[:, None], frequency[None, :]).astype(int)
    total = np.bincount(radius.ravel(), power.ravel())[:32]
    return total / np.bincount(radius.ravel())[:32]


def high_frequency_ratio(images: np.ndarray, reference: np.ndarray) -> float:
    """Power in the upper half of the frequencies over the reference's: 1 is right, below is too smooth."""
    return float(power_spectrum(images)[16:].sum() / power_spectrum(reference)[16:].sum())


def patch_distance(
    images: np.ndarray, reference: np.ndarray, size: int = 7, patches: int = 20_000, directions: int = 128
) -> float:
    """Sliced Wasserstein distance between mean-free colour patches, in grey levels (0..255)."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(size * size * 3, directions))
    axes /= np.linalg.norm(axes, axis=0)
    a, b = (_patches(pictures, size, patches, rng) @ axes for pictures in (images, reference))
    return float(np.abs(np.sort(a, axis=0) - np.sort(b, axis=0)).mean())


def _patches(images: np.ndarray, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [count, size * size * 3], the mean colour removed, drawn with replacement."""
    which = rng.integers(0, len(images), count)
    y, x = rng.integers(0, images.shape[1] - size + 1, (2, count))
    offsets = np.arange(size)
    rows, columns = y[:, None, None] + offsets[:, None], x[:, None, None] + offsets[None, :]
    patches = images[which[:, None, None], rows, columns].astype(np.float64)
    return (patches - patches.mean((1, 2), keepdims=True)).reshape(count, -1)
