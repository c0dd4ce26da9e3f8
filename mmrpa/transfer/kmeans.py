"""Spherical k-means over batches of points; needs torch alone.

SciPy's and scikit-learn's are Euclidean, on the CPU and one set of points at a
time, and neither is a dependency of all hosts.
"""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def spherical_kmeans(points: Tensor,
                     num_clusters: int,
                     generator: torch.Generator,
                     max_iters: int = 30) -> Tensor:
    """Directions that points cluster around, for several sets at once.

    Maximises the sum over points of their largest dot product with a unit
    centre (Dhillon and Modha, "Concept decompositions for large sparse text
    data using clustering", 2001), from k-means++ seeds. Long points count for
    more than short ones: they are not normalised.

    Args:
        points (Tensor): (G, n, d), floating point: G sets of n points.
        num_clusters (int): Clusters M a set, at most n.
        generator (torch.Generator): Decides the seeds; on the CPU.
        max_iters (int): Most rounds; it ends earlier where no point moves.

    Returns:
        Tensor: Unit centres (G, M, d).

    Raises:
        ValueError: There are fewer points than clusters.
    """
    if points.dim() != 3 or not 1 <= num_clusters <= points.shape[1]:
        raise ValueError(
            f'spherical_kmeans needs points (G, n, d) with n of at least '
            f'num_clusters={num_clusters}, got {tuple(points.shape)}')
    centers = _seeds(points, num_clusters, generator)
    labels = None
    for _ in range(max_iters):
        old, (labels, fit) = labels, _assign(points, centers)
        if old is not None and torch.equal(old, labels):
            break
        centers = _update(points, labels, fit, num_clusters)
    return centers


def _assign(points: Tensor, centers: Tensor) -> Tuple[Tensor, Tensor]:
    """The centre (G, n) of each point, and its dot product with it."""
    fit, labels = (points @ centers.transpose(1, 2)).max(dim=-1)
    return labels, fit


def _update(points: Tensor, labels: Tensor, fit: Tensor,
            num_clusters: int) -> Tensor:
    members = F.one_hot(labels, num_clusters).to(points.dtype)
    centers = members.transpose(1, 2) @ points  # (G, M, d)
    empty = members.sum(1) == 0
    for group in empty.any(1).nonzero().flatten().tolist():
        # A centre that has lost all its points takes those that fit worst.
        misfit = points[group].norm(dim=-1) - fit[group]
        vacant = empty[group].nonzero().flatten()
        worst = misfit.topk(len(vacant)).indices
        centers[group, vacant] = points[group, worst]
    return F.normalize(centers, dim=-1)


def _seeds(points: Tensor, num_clusters: int,
           generator: torch.Generator) -> Tensor:
    """k-means++ seeds: each far from those before, with some chance."""
    groups, num_points, _ = points.shape
    norms = points.norm(dim=-1)
    misfit = norms.square()
    chosen = []
    for _ in range(num_clusters):
        # The floor keeps sets of equal points from having no chance at all.
        weights = misfit.clamp(min=0) + 1e-12
        draws = torch.rand(groups, 1, generator=generator).to(points)
        total = weights.cumsum(-1)
        index = torch.searchsorted(total, draws * total[:, -1:])
        index = index.clamp(max=num_points - 1)
        center = F.normalize(
            points.gather(1, index[..., None].expand(-1, -1,
                                                     points.shape[-1])),
            dim=-1)
        chosen.append(center)
        # Twice norm * (norm - dot) is the squared distance from a point to
        # the centre stretched to the point's length.
        dot = (points @ center.transpose(1, 2)).squeeze(-1)
        misfit = torch.minimum(misfit, norms * (norms - dot))
    return torch.cat(chosen, dim=1)
