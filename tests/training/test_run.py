"""What a run says of itself, at its start, at its end and on its page."""

import json
import re
import shlex
import shutil
import sys

import torch

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.cli import main, make_parser
from dia_diffusion.options.training import parse_arguments
from dia_diffusion.process.output import duration
from dia_diffusion.training.results import write_run_report
from dia_diffusion.training.run import explain_end


def commands_in(text):
    return [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")]


def test_a_run_explains_itself_in_one_block(undisturbed):
    folder, _, _ = undisturbed
    lines = folder.with_suffix(".log").read_text().splitlines()
    facts = dict(re.split(": +", line, maxsplit=1) for line in lines[:9])
    assert list(facts) == "Data,Held out,Model,Objective,Steps,Batch,Device,Recipe,Output".split(",")
    assert facts["Data"].startswith("1,437 images of 'digits', split train: 8x8 pixels")
    assert facts["Held out"].startswith("360 images")
    weights = DIAUNet2DModel.from_pretrained(folder / "unet").state_dict()
    every, own = (sum(w.numel() for n, w in weights.items() if n.startswith(start)) for start in ("", "dia."))
    assert facts["Model"] == (
        f"{every:,} parameters, {own:,} of them attention (lstm, sharing network); sees pixels of 1x8x8."
    )
    assert "prediction_type epsilon" in facts["Objective"]
    assert facts["Steps"] == f"6: {6 / 180:.3g} passes over the images."
    assert facts["Batch"] == "8 images: 8 per process x 1 processes x 1 accumulated."
    assert facts["Device"] == f"{'cuda' if torch.cuda.is_available() else 'cpu'}, in float32."
    assert facts["Recipe"] == "none (dia train --recipes)."
    assert facts["Output"].startswith(f"{folder}: checkpoints every 3 steps")
    assert facts["Output"].endswith("scores of 10 images.")
    # The time that it takes is said when the first steps are done, and that of the scores before they are made.
    assert re.fullmatch(r"Time: +about \d+ seconds? for the 2 steps that are left\.", lines[-2])
    assert re.fullmatch(r"Scoring 10 generated images takes up to about .*--score_num_images takes fewer\.", lines[-1])


def test_the_end_names_what_was_made_and_commands_that_fit(undisturbed, tmp_path, monkeypatch):
    config = parse_arguments(["--output_dir", str(undisturbed[0])])
    folder, figures = undisturbed[:2]
    text = explain_end(config, figures)
    assert "scores (metrics.json)" in text
    assert "best/" not in text
    assert f"dia sample {folder} --num_images 16 --class_label 9" in text
    # Other data, no classes, scores, attention or Gradio; a best pipeline, and a space in the folder's name.
    other = shutil.copytree(folder, tmp_path / "my run")
    shutil.copytree(other, tmp_path / "best")
    shutil.move(tmp_path / "best", other / "best")
    index = json.loads((other / "model_index.json").read_text()) | {"id2label": None}
    (other / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setitem(sys.modules, "gradio", None)
    options = ["--train_data_dir", str(tmp_path), "--dia_attention", "none", "--output_dir", str(other)]
    plain = explain_end(parse_arguments(options), {"step": 6})
    assert "best/" in plain
    assert not re.search("scores \\(|class_label|dia app|dia analyze", plain)
    assert f"dia evaluate '{other}' --features inception" in plain
    for command in (*commands_in(text), *commands_in(plain)):
        make_parser().parse_args(shlex.split(command)[1:])
    assert len(commands_in(plain)) == 2


def test_the_page_holds_nothing_that_is_empty(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    facts = {"Data": "1,437 images of <digits>: 8x8 pixels", "Model": "3 parameters"}
    write_run_report(folder, undisturbed[1], facts)
    page = (folder / "report.html").read_text()
    assert "<title>run: 6 steps on 1,437 images of &lt;digits&gt;</title>" in page
    assert "<dt>Data</dt><dd>1,437 images of &lt;digits&gt;: 8x8 pixels</dd>" in page
    assert f"The floor is {undisturbed[1]['floor']['fid']:.2f}: another 360 real images" in page
    write_run_report(folder, {"step": 1, "global_batch_size": 8, "loss": None}, facts)
    page = (folder / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Samples", "The run"]
    assert page.count("<img") == 1


def test_times_in_words():
    assert [duration(seconds) for seconds in (0, 40.4, 89, 180, 9000)] == [
        "1 second", "40 seconds", "89 seconds", "3 minutes", "2.5 hours",
    ]  # fmt: skip


def test_the_demo_goes_on_where_it_stopped(undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed[0], tmp_path / "digits")
    before = (folder / "metrics.json").stat()
    assert main(["demo", "--output_dir", str(folder)]) == 0
    assert len(list((folder / "images").iterdir())) == 100
    assert f"Open {folder}/report.html" in capsys.readouterr().out
    made = (folder / "images.png").stat()
    assert main(["demo", "--output_dir", str(folder)]) == 0
    assert ((folder / "images.png").stat(), (folder / "metrics.json").stat()) == (made, before)
