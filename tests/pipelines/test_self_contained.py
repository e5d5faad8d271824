"""Saved pipelines run where only diffusers is, on the code they hold; where dia_diffusion is, on the installed code."""

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchHeunDiscreteScheduler, UNet2DModel

from autoencoders import random_vae
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.pipelines.self_contained import single_file_source
from dia_diffusion.sampling.loading import load_pipeline
from environments import REFERENCE, digest, run_python
from training_runs import ROOT

# Residual blocks as downsamplers take a path of their own through the code.
TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
}


def dia_pipeline(seed=0, scheduler=None):
    torch.manual_seed(seed)
    unet = DIAUNet2DModel(**TINY, dia_hidden_size=8).eval()
    for decoder in unet.dia.decoders.values():
        torch.nn.init.normal_(decoder.weight)
    return DIAUNetPipeline(unet, scheduler or DDIMScheduler())


def in_default_format(pipeline):
    """Undoes what `load_pipeline` changes for speed, which moves the last bits."""
    pipeline.unet.to(memory_format=torch.contiguous_format)
    return pipeline


def test_a_folder_gives_the_same_images_where_only_diffusers_is(tmp_path, diffusers_only):
    plain = DIAUNetPipeline(UNet2DModel(**TINY).eval(), DDIMScheduler())
    pipelines = {"first": dia_pipeline(0), "second": dia_pipeline(1), "plain": plain}
    unet, scheduler = (
        UNet2DModel(**TINY | {"in_channels": 2, "out_channels": 2}).eval(),
        DDIMScheduler(clip_sample=False),
    )
    pipelines["latents"] = DIAUNetPipeline(unet, scheduler, vae=random_vae())
    for name, scheduler in (("edm", EDMEulerScheduler(sigma_data=0.7)), ("flow", FlowMatchHeunDiscreteScheduler())):
        pipelines[name] = dia_pipeline(2, scheduler)
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
    code = """
import json, sys, torch
from diffusers import DiffusionPipeline
from environments import digest

loaded = {n: DiffusionPipeline.from_pretrained(n, trust_remote_code=True) for n in sys.argv[2:]}
# All at once: loading a second pipeline runs its code again, which must not disturb the first.
digests = {name: digest(pipeline) for name, pipeline in loaded.items()}
loaded["first"].save_pretrained("saved again")
digests["saved again"] = digest(DiffusionPipeline.from_pretrained("saved again", trust_remote_code=True))
try:
    DiffusionPipeline.from_pretrained("first")
except ValueError as error:
    refusal = str(error)
old = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
images = old(2, 4, generator, class_labels=[0, 1], guidance_scale=2.0, output_type="np").images
modules = sorted({type(p.unet).__module__ for p in loaded.values()})
print(json.dumps({"digests": digests, "refusal": refusal, "old": images.tolist(), "modules": modules}))
"""
    home = {"HF_HOME": str(tmp_path / "home")}
    found = json.loads(run_python(code, REFERENCE, *pipelines, python=diffusers_only, folder=tmp_path, **home))
    # Of a VAE the last bits hang on where its weights lie in memory.
    pipelines["latents"] = DIAUNetPipeline.from_pretrained(tmp_path / "latents")
    expected = {name: digest(pipeline) for name, pipeline in pipelines.items()}
    assert found["digests"] == expected | {"saved again": expected["first"]}
    assert len(set(expected.values())) == 6
    assert found["modules"] == ["diffusers.models.unets.unet_2d", "diffusers_modules.local.dia_unet"]
    assert "trust_remote_code=True" in found["refusal"]
    assert digest(DIAUNetPipeline.from_pretrained(tmp_path / "saved again")) == expected["first"]
    assert_same_on_any_cpu(np.array(found["old"], dtype=np.float32), np.load(REFERENCE / "images.npy"))


def assert_same_on_any_cpu(images, expected):
    # Another CPU adds in another order; the last bits of float32 differ, and a few steps make little more of them.
    assert images.std() > 0.1
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_a_pipeline_of_version_0_1_0_loads_and_gives_the_same_images():
    pipeline = DIAUNetPipeline.from_pretrained(REFERENCE)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(2, 4, generator, class_labels=[0, 1], guidance_scale=2.0, output_type="np").images
    assert_same_on_any_cpu(images, np.load(REFERENCE / "images.npy"))


def test_the_installed_code_runs_and_not_that_of_the_folder(tmp_path):
    pipeline = dia_pipeline()
    pipeline.save_pretrained(tmp_path)
    for path in (tmp_path / "pipeline_dia_unet.py", tmp_path / "unet" / "dia_unet.py"):
        assert path.is_file()
        path.write_text("raise RuntimeError('the code of the folder was run')\n")
    for loaded in (DIAUNetPipeline.from_pretrained(tmp_path), load_pipeline(str(tmp_path))):
        assert type(loaded) is DIAUNetPipeline
        assert type(loaded.unet) is DIAUNet2DModel
        assert digest(in_default_format(loaded)) == digest(pipeline)


def test_a_folder_without_code_loads(tmp_path):
    # As the first versions saved it.
    pipeline = dia_pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline_dia_unet.py").unlink()
    (tmp_path / "unet" / "dia_unet.py").unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "DIAUNetPipeline", "unet": ["dia_diffusion.unet", "DIAUNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for loaded in (DIAUNetPipeline.from_pretrained(tmp_path), load_pipeline(str(tmp_path))):
        assert type(loaded) is DIAUNetPipeline
        assert digest(in_default_format(loaded)) == digest(pipeline)


def test_a_class_of_ones_own_is_saved_as_diffusers_saves_it(tmp_path):
    class Mine(DIAUNetPipeline):
        pass

    Mine(dia_pipeline().unet, DDIMScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Mine"
    assert not (tmp_path / "test_self_contained.py").exists()
    assert type(Mine.from_pretrained(tmp_path)) is Mine


@pytest.mark.parametrize("name", ["dia_diffusion.models.unet", "dia_diffusion.pipelines.pipeline_dia_unet"])
def test_the_code_is_one_readable_file(name):
    module = importlib.import_module(name)
    source = single_file_source(module)
    tree = ast.parse(source)
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names += [target.id for target in assigned if isinstance(target, ast.Name)]
    assert len(names) == len(set(names)), "modules that are joined must not use a name for two things"
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages == {"torch", "diffusers"}
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    # The text is there as it was written, comments and docstrings included.
    body = Path(module.__file__).read_text(encoding="utf-8").split("\n\n\n", 1)[1]
    assert body.strip() in source


def test_the_code_is_that_which_was_imported_and_not_that_of_the_files_now(tmp_path):
    """An edit, or an update of the package, while a model trains."""
    package = tmp_path / "package"
    for folder in ("dia_diffusion", "pipelines"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.move(package / "pipelines", package / "dia_diffusion" / "pipelines")
    code = """
import sys, pathlib
import dia_diffusion.pipelines
from diffusers import DDIMScheduler
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
for path in pathlib.Path(dia_diffusion.__file__).parent.rglob("*.py"):
    path.write_text("raise RuntimeError('edited')")
unet = DIAUNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                      down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
DIAUNetPipeline(unet, DDIMScheduler()).save_pretrained("saved")
"""
    run_python(code, folder=tmp_path, PYTHONPATH=str(package))
    for path in ("pipeline_dia_unet.py", "unet/dia_unet.py"):
        assert "edited" not in (tmp_path / "saved" / path).read_text()
    assert type(DIAUNetPipeline.from_pretrained(tmp_path / "saved")) is DIAUNetPipeline


def test_code_that_does_not_fit_the_installed_versions_says_for_which_it_was_written(tmp_path):
    dia_pipeline().save_pretrained(tmp_path)
    for path in ("pipeline_dia_unet.py", "unet/dia_unet.py"):
        source = (tmp_path / path).read_text().replace("from diffusers import ", "from diffusers import NoLonger, ")
        with pytest.raises(ImportError, match=f"written for diffusers {diffusers.__version__} and torch.*NoLonger"):
            exec(compile(source, path, "exec"), {"__name__": "loaded"})
