"""Similarities of attention maps against numpy and other forms of their formulas."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.analysis.analysis_report import report
from dia_diffusion.analysis.maps import Block, collect_maps, place_blocks
from dia_diffusion.analysis.similarity import (
    all_samples,
    channel_correlations,
    cka_of_pairs,
    describe_pairs,
    group_pairs,
    linear_cka,
    pearson,
    timestep_share,
    within_timestep,
)
from dia_diffusion.cli import main
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.randomness import step_seed

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    return prepare_pixels(load_digits_dataset()["test"], 8)


def test_correlation_agrees_with_numpy(random):
    a = random.normal(size=(3, 40, 5)).astype(np.float32)
    b = (a * 0.5 + random.normal(size=(3, 40, 5))).astype(np.float32)
    flat_a, flat_b = a.reshape(120, 5), b.reshape(120, 5)
    expected = [np.corrcoef(flat_a[:, channel], flat_b[:, channel])[0, 1] for channel in range(5)]
    np.testing.assert_allclose(pearson(all_samples(a), all_samples(b)), expected, rtol=1e-6)


def test_within_a_timestep_what_the_timestep_alone_does_is_no_correlation(random):
    steps = random.normal(size=(6, 1, 4)) * 10
    a, b = (steps + random.normal(size=(6, 500, 4)) for _ in range(2))
    assert (pearson(all_samples(a), all_samples(b)) > 0.9).all()
    assert (np.abs(pearson(within_timestep(a), within_timestep(b))) < 0.06).all()
    # With one timestep the two views are the same.
    one = pearson(all_samples(a[:1]), all_samples(b[:1]))
    np.testing.assert_allclose(pearson(within_timestep(a[:1]), within_timestep(b[:1])), one)
    # And with the same noise in both it is found again.
    common = random.normal(size=(6, 500, 4))
    assert (pearson(within_timestep(a + 9 * common), within_timestep(b - 9 * common)) < -0.9).all()


def test_cka_agrees_with_its_form_by_gram_matrices(random):
    """Kornblith et al. 2019, equations 3 and 4: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels."""
    x, y = random.normal(size=(30, 4)) + 3, random.normal(size=(30, 7))
    y[:, :4] += x
    centring = np.eye(30) - 1 / 30
    kernel_x, kernel_y = x @ x.T, y @ y.T

    def hsic(k, other):
        return np.trace(k @ centring @ other @ centring)

    expected = hsic(kernel_x, kernel_y) / np.sqrt(hsic(kernel_x, kernel_x) * hsic(kernel_y, kernel_y))
    x, y = x - x.mean(0), y - y.mean(0)
    assert 0.2 < expected < 0.9
    assert linear_cka(x, y) == pytest.approx(expected)
    assert linear_cka(y, x) == pytest.approx(expected)
    rotation, _ = np.linalg.qr(random.normal(size=(7, 7)))
    assert linear_cka(y, 3 * y @ rotation) == pytest.approx(1)


def test_what_is_constant_has_no_similarity(random):
    a, b = random.normal(size=(2, 1, 20, 3))
    a[..., 1] = 1.0
    # Rounding is no variation.
    b[..., 2] = 1.0 + random.choice([-6e-8, 0, 6e-8], size=(1, 20))
    result = pearson(all_samples(a), all_samples(b))
    assert np.isnan(result).tolist() == [False, True, True]
    assert np.isnan(linear_cka(all_samples(a), np.zeros((20, 2))))
    assert np.isnan(timestep_share(np.ones((2, 5, 3))))


def test_timestep_share_is_that_of_the_variance_between_timesteps(random):
    between, between_images = 3 * random.normal(size=(200, 1, 1)), random.normal(size=(200, 300, 2))
    assert timestep_share(between + between_images) == pytest.approx(0.9, abs=0.02)
    assert timestep_share(np.broadcast_to(between, (200, 300, 2))) == pytest.approx(1)


def test_blocks_are_placed_by_their_names():
    down_block_types = ("SkipDownBlock2D", "DownBlock2D")
    model = DIAUNet2DModel(**SMALL | {"in_channels": 3, "down_block_types": down_block_types})
    names = list(model.attention_maps(torch.randn(1, 3, 8, 8), 3))
    blocks = place_blocks(names)
    assert [block.name for block in blocks] == names
    places = {block.name: block for block in blocks}
    assert places["down_blocks.0.resnets.0"] == Block("down_blocks.0.resnets.0", "down", 0, "down 0.0")
    assert places["down_blocks.0.resnet_down"].label == "down 0.down"
    assert places["mid_block.resnets.1"] == Block("mid_block.resnets.1", "mid", 1, "mid 1")
    assert places["up_blocks.0.resnets.1"] == Block("up_blocks.0.resnets.1", "up", 1, "up 0.1")
    assert places["up_blocks.1.resnets.0"].level == 0


def test_pairs_are_grouped_by_level_and_path():
    blocks = [Block("a", "down", 0, ""), Block("b", "down", 1, ""), Block("c", "up", 0, "")]
    similarity = {("a", "b"): np.array([0.5]), ("a", "c"): np.array([-1.0, np.nan]), ("b", "c"): np.array([np.nan])}
    assert group_pairs(blocks, similarity) == {
        "every pair": [("a", "b"), ("a", "c"), ("b", "c")],
        "between levels": [("a", "b"), ("b", "c")],
        "down-down": [("a", "b")],
        "level 0": [("a", "c")],
        "down-up": [("a", "c"), ("b", "c")],
    }
    described = describe_pairs(blocks, similarity)
    every = described["groups"]["every pair"]
    assert [every[name] for name in ("mean", "mean_absolute", "maximum", "count")] == [-0.25, 0.75, 0.5, 2]
    assert described["pairs"][2] == {"blocks": ["b", "c"], **dict.fromkeys(every), "count": 0}


def test_maps_are_those_of_the_model_whatever_the_batch_size(digits):
    model = DIAUNet2DModel(**SMALL, dia_attention="se", dia_init="paper").eval()
    scheduler = DDPMScheduler()
    maps, timesteps = collect_maps(model, scheduler, digits, num_images=10, num_timesteps=3, batch_size=4)
    assert timesteps == [166, 500, 833]
    images = digits.fetch(range(0, 360, 36))["images"].float() / 127.5 - 1
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(step_seed(0, 1)))
    signal = scheduler.alphas_cumprod[500]
    expected = model.attention_maps(signal.sqrt() * images + (1 - signal).sqrt() * noise, 500)
    for name, gate in expected.items():
        assert maps[name].shape == (3, *gate.shape)
        np.testing.assert_allclose(maps[name][1], gate, atol=1e-5)
    whole, _ = collect_maps(model, scheduler, digits, num_images=10, num_timesteps=3, batch_size=10)
    np.testing.assert_allclose(whole["mid_block.resnets.0"], maps["mid_block.resnets.0"], atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"dia_attention": kind, "dia_sharing": "block"} for kind in ("se", "eca", "srm", "cbam")]
    + [{"dia_attention": "se"}, {"dia_attention": "lstm"}, {"dia_attention": "lstm", "dia_sharing": "level"}],
    ids=str,
)
def test_every_attention_can_be_analysed(digits, arguments):
    # With a reduction the few hidden units of so small a module may all be dead.
    model = DIAUNet2DModel(**SMALL, **arguments, dia_init="paper", dia_reduction=1)
    maps, _ = collect_maps(model, DDPMScheduler(), digits, num_images=8, num_timesteps=2)
    correlation, cka = channel_correlations(maps, "all"), cka_of_pairs(maps, "all")
    assert len(cka) == len(maps) * (len(maps) - 1) // 2
    assert {(8, 8), (16, 16)} == {(maps[a].shape[-1], maps[b].shape[-1]) for a, b in correlation}
    for values in (*correlation.values(), *cka.values()):
        assert np.nanmax(np.abs(values)) <= 1 + 1e-9


def test_a_fresh_model_has_null_figures_and_a_word_on_it(digits, tmp_path):
    model = DIAUNet2DModel(**SMALL)
    maps, timesteps = collect_maps(model, DDPMScheduler(), digits, num_images=4, num_timesteps=2)
    assert report(maps, timesteps, tmp_path) == json.loads((tmp_path / "analysis.json").read_text())
    figures = json.loads((tmp_path / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert "constant" in figures["notes"][0]
    for similarity in ("correlation", "cka"):
        assert figures[similarity]["all"]["groups"]["every pair"]["mean"] is None
    assert {block["timestep_share"] for block in figures["blocks"]} == {None}


def test_analyze_leaves_figures_and_pictures(tmp_path, capsys):
    model = DIAUNet2DModel(**SMALL, num_class_embeds=11, dia_attention="se", dia_sharing="block", dia_init="paper")
    DIAUNetPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--num_images", "12", "--num_timesteps", "2", "--output_dir", str(out)]
    assert main(["analyze", str(tmp_path / "model"), "--dataset", "digits", *options]) == 0
    names = {"analysis.json", "correlation.png", "cka.png", "channels.png", "gates.png", "report.html"}
    assert {path.name for path in out.iterdir()} == names
    page = (out / "report.html").read_text()
    assert page.count("<img") == 4
    assert "<td>every pair</td>" in page
    figures = json.loads((out / "analysis.json").read_text())
    assert figures["notes"] == []
    assert figures["num_images"] == 12
    mean = figures["correlation"]["all"]["groups"]["every pair"]["mean"]
    assert f"| every pair | {mean:.2f} |" in capsys.readouterr().out
    # The page of a training run has the same name, and is not replaced.
    (tmp_path / "model" / "report.html").write_text("of the run")
    for wrong, words in (
        (["--num_timesteps", "1001"], "the model has 1000 timesteps, fewer than the 1001"),
        (["--output_dir", str(tmp_path / "model")], "holds another command's report"),
    ):
        assert main(["analyze", str(tmp_path / "model"), "--dataset", "digits", *options, *wrong]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "model" / "report.html").read_text() == "of the run"
    (tmp_path / "bare").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "bare" / "0.png")
    assert main(["analyze", str(tmp_path / "model"), "--dataset", str(tmp_path / "bare"), *options]) == 2
    assert "is class-conditional, and the images of" in capsys.readouterr().err
    plain = DIAUNet2DModel(**SMALL, dia_attention="none")
    DIAUNetPipeline(plain, DDPMScheduler()).save_pretrained(tmp_path / "plain")
    assert main(["analyze", str(tmp_path / "plain")]) == 2
    assert "has no attention maps" in capsys.readouterr().err
    wide = DIAUNet2DModel(**{**SMALL, "sample_size": (8, 16)})
    DIAUNetPipeline(wide, DDPMScheduler()).save_pretrained(tmp_path / "wide")
    assert main(["analyze", str(tmp_path / "wide")]) == 2
    assert "only square images" in capsys.readouterr().err
