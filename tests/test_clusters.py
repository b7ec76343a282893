"""Clusters of good images: they follow class names, find products without names, and leave one product whole."""

import numpy as np
import pytest
import torch
from painting import part
from test_statistics import normal
from tiny import run_config

from twinspect.decide.decision import mixed_up
from twinspect.models.clusters import (
    GAP,
    Clusters,
    drop_small,
    groups,
    k_means,
    merge_centres,
    repetition,
)
from twinspect.models.contract import build_model

PRODUCTS = ("weave", "ring", "brushed")
_MOST, _FRESH = 50, 20


@pytest.fixture(scope="module")
def painted() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and embeddings of 70 painted pictures of each of three products, by the real teacher."""
    model = build_model(run_config("efficientnet-lite0", pretrained=True, size=128).model)
    found = []
    for index in range(len(PRODUCTS)):
        rng = np.random.default_rng(index)
        pixels = np.stack([part(index, rng, 128) for _ in range(_MOST + _FRESH)])
        with torch.no_grad():
            batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(10)
            seen = [model.observe(model.teacher.normalise(one)) for one in batches]
        found.append((torch.cat([one.tokens[0] for one in seen]), torch.cat([one.embedding_BF for one in seen])))
    return found


def learnt(painted: list[tuple[torch.Tensor, torch.Tensor]], sizes: list[int], names: list[str]) -> Clusters:
    """Clusters of the first so many pictures of each product; what it says of each is what `fit` said."""
    tokens, embeddings = (
        torch.cat([one[part][:size] for one, size in zip(painted, sizes, strict=True)]) for part in (0, 1)
    )
    clusters = Clusters(tokens.shape[1])
    cluster = clusters.fit(tokens, embeddings, names, seed=0)
    assert torch.equal(clusters(tokens), cluster)
    return clusters


def of_fresh(clusters: Clusters, painted: list[tuple[torch.Tensor, torch.Tensor]]) -> list[list[int]]:
    """Cluster of the pictures of each product that were not learnt."""
    return [clusters(tokens[_MOST:]).tolist() for tokens, _ in painted]


@pytest.mark.parametrize("each", [12, 20, 30, 50])
def test_named_products_are_told_apart_by_any_number_of_images(painted, each: int) -> None:
    names = [name for name in PRODUCTS for _ in range(each)]
    clusters = learnt(painted, [each] * 3, names)
    assert clusters.count == 3
    for name, found in zip(PRODUCTS, of_fresh(clusters, painted), strict=True):
        assert found == [sorted(PRODUCTS).index(name)] * _FRESH


def test_two_names_of_one_product_are_mixed_up_and_this_is_said(painted) -> None:
    clusters = learnt(painted, [40, 20, 20], ["lot1", "lot2"] * 20 + ["ring"] * 20 + ["brushed"] * 20)
    assert clusters.taken.total() == 80
    assert clusters.taken["ring", "ring"] == clusters.taken["brushed", "brushed"] == 20
    said = mixed_up(clusters.taken)
    assert said.startswith("classes that look alike are mixed up: ")
    assert f"{clusters.taken['lot1', 'lot2']} of 20 good images of lot1 are taken for lot2" in said
    assert "ring" not in said


def test_products_that_are_told_apart_are_not_spoken_of(painted) -> None:
    clusters = learnt(painted, [12] * 3, [name for name in PRODUCTS for _ in range(12)])
    assert mixed_up(clusters.taken) == ""


def test_a_sentence_names_the_worst_pairs_only() -> None:
    taken = {(name, name): 10 for name in "abcdef"} | {(name, "f"): n for n, name in enumerate("abcde", 1)}
    said = mixed_up(taken)
    assert "of a are" not in said  # one image
    assert said.index("5 of 15 good images of e are taken for f") < said.index("2 of 12 good images of b")
    assert mixed_up({("a", "a"): 99, ("a", "b"): 2}) == ""


def test_a_large_class_does_not_swallow_a_small_one(painted) -> None:
    clusters = learnt(painted, [50, 8, 3], ["a"] * 50 + ["b"] * 8 + ["c"] * 3)
    assert of_fresh(clusters, painted) == [[k] * _FRESH for k in range(3)]


@pytest.mark.parametrize("sizes", [[50, 50, 50], [30, 30, 30], [16, 16, 16], [50, 30, 20]])
@pytest.mark.parametrize("name", ["", "parts"])
def test_products_are_found_without_names(painted, sizes: list[int], name: str) -> None:
    clusters = learnt(painted, sizes, [name] * sum(sizes))
    assert clusters.count == 3
    found = of_fresh(clusters, painted)
    assert [len(set(own)) for own in found] == [1, 1, 1]
    assert len({own[0] for own in found}) == 3


@pytest.mark.parametrize("product", range(3))
@pytest.mark.parametrize("count", [10, 30, 50])
def test_one_product_stays_one(painted, product: int, count: int) -> None:
    tokens, embeddings = (one[:count] for one in painted[product])
    clusters = Clusters(tokens.shape[1])
    clusters.fit(tokens, embeddings, [""] * count, seed=0)
    assert clusters.count == 1
    assert float(clusters.link_K[0]) > 0.9  # pictures of one product repeat each other


def test_a_named_product_is_one_cluster_whatever_its_looks(painted) -> None:
    clusters = learnt(painted, [_MOST] * 3, ["cloth"] * _MOST + ["metal"] * 2 * _MOST)
    assert clusters.count == 2
    assert of_fresh(clusters, painted) == [[0] * _FRESH, [1] * _FRESH, [1] * _FRESH]


# ------------------------------------------------------------------------------------------- drawn tokens


def drawn(products: int, each: int = 60, dims: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of products that lie as far apart as directions of a wide space do, and the product of each."""
    owner = torch.arange(products).repeat_interleave(each)
    return 3 * normal(products, dims, seed=8)[owner] + normal(each * products, dims, seed=9), owner


@pytest.mark.parametrize("products", [1, 2, 6, 15, 30, 40])
def test_any_number_of_products_is_told_apart(products: int) -> None:
    """Sixteen groups of forty products would mix them all; six products must not become seven."""
    tokens, owner = drawn(products)
    found = groups(tokens, seed=0)
    assert len(found.unique()) == products
    assert len(set(zip(owner.tolist(), found.tolist(), strict=True))) == products


def test_groups_are_deterministic_and_do_not_depend_on_scale_or_place() -> None:
    tokens, _ = drawn(3)
    first = groups(tokens, seed=3)
    assert torch.equal(first, groups(tokens, seed=3))
    assert torch.equal(first, groups(1000.0 + 50.0 * tokens, seed=3))


@pytest.mark.parametrize("count", [1, 2, 6, 12, 40])
@pytest.mark.parametrize("named", [False, True])
def test_a_handful_of_images_or_copies_of_one(count: int, named: bool) -> None:
    names = [f"c{i % 2}" if named else "" for i in range(count)]
    for tokens in (normal(count, 16), torch.ones(count, 16)):
        clusters = Clusters(16)
        assert len(clusters.fit(tokens, tokens, names, seed=0)) == count
        assert clusters.count == (min(count, 2) if named else 1)
        assert all(one.double().isfinite().all() for one in clusters.buffers())
        assert 0 <= int(clusters(normal(5, 16, seed=3)).max()) < clusters.count


def test_halves_of_one_gaussian_are_joined_and_products_are_not() -> None:
    line = normal(400, 3)
    centres = torch.tensor([[-0.8, 0.0, 0.0], [0.8, 0.0, 0.0]])
    assert merge_centres(line, centres, GAP).tolist() == [0, 0]
    apart = torch.cat([line[:200], line[200:] + 14.0])
    assert merge_centres(apart, torch.tensor([[0.0] * 3, [14.0] * 3]), GAP).tolist() == [0, 1]


def test_k_means_finds_what_is_there_and_small_groups_are_dropped() -> None:
    truth = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    points = torch.cat([truth[k] + 0.3 * normal(size, 2, seed=k) for k, size in enumerate((50, 30, 4))])
    centres = k_means(points, 3, seed=0)
    assert float(torch.cdist(truth, centres).amin(1).max()) < 0.5
    left = drop_small(points, centres, 10)
    assert len(left) == 2
    assert float(torch.cdist(truth[:2], left).amin(1).max()) < 0.5


def test_repetition_tells_production_from_photographs() -> None:
    shape = normal(1, 64)
    product = shape + 0.1 * normal(80, 64, seed=2)
    kinds = shape + 0.1 * normal(80, 64, seed=3) + normal(4, 64, seed=4).repeat_interleave(20, 0)
    photographs = normal(80, 64, seed=5)
    owner = torch.arange(3).repeat_interleave(80)
    one, several, none = repetition(torch.cat([product, kinds, photographs]), owner, 3).tolist()
    assert min(one, several) > 0.99
    assert none < 0.01
    assert repetition(photographs[:3], torch.zeros(3, dtype=torch.long), 1).tolist() == [1.0]  # too few to tell
