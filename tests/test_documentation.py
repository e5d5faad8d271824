"""The commands in the documentation: those that are quick run, the others are read by the parsers that they are for."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from diffusers import DDPMScheduler

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main, make_parser
from dia_diffusion.options.training import CONFIG, parse_arguments
from tiny_unets import GREY
from training_runs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What is not this project's.
OTHERS = {
    "accelerate": {"--num_processes", "--num_machines", "--mixed_precision", "--dynamo_backend", "--cpu", "--quiet"},
    "ray": {"--head", "--address"},
    "pip": {"--index-url", "--editable"},
    "hf": {"--exclude"},
}


def documented_commands():
    """Each command of a fenced or an indented block, with its page; comments and variables before it are left out."""
    for page in PAGES:
        text = page.read_text()
        lines = "".join(re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ").splitlines()
        lines += re.findall(r"^    ((?:[A-Z_]+=\S+ )*(?:dia|python|pip) .*)$", text, re.M)
        for line in lines:
            if words := [word for word in shlex.split(line, comments=True) if not re.match("[A-Z_]+=", word)]:
                yield pytest.param(words, id=f"{page.name}: {' '.join(words)[:70]}")


COMMANDS = list(documented_commands())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model as that of the demo: of ten classes, 8x8 in grey."""
    folder = tmp_path_factory.mktemp("model")
    unet = DIAUNet2DModel(**GREY, num_class_embeds=11, dia_init="paper")
    names = {number: str(number) for number in range(10)}
    DIAUNetPipeline(unet, DDPMScheduler(), names).save_pretrained(folder)
    (folder / CONFIG).write_text("dataset_name: digits\nresolution: 8\n")
    return folder


@pytest.fixture
def somewhere(model, tmp_path, monkeypatch):
    """A folder with a model where the documentation has one, and with what its commands name."""
    (tmp_path / "runs").mkdir()
    for name in ("digits", "guide"):
        (tmp_path / "runs" / name).symlink_to(model)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_training(arguments):
    options = [word for word in arguments if word != "..."]
    if "--config" not in options:
        parse_arguments(options)


def read_dia(arguments):
    if arguments[0] == "train":
        read_training(arguments[1:])
    else:
        make_parser().parse_args(arguments)
        assert_there(arguments)


def assert_there(arguments):
    """Check that files named in the repository exist: under these folders a command writes nothing."""
    for word in arguments:
        assert not word.startswith(("docs/", "studies/", "tests/")) or (ROOT / word).exists(), word


def read_launch(arguments):
    """`accelerate launch`: its own options, the script or module, and the options of that."""
    assert arguments[0] == "launch"
    start = next(i for i, word in enumerate(arguments) if word in ("train_unet.py", "-m", "--module"))
    assert {word for word in arguments[1:start] if word.startswith("-")} <= OTHERS["accelerate"]
    if arguments[start] == "train_unet.py":
        read_training(arguments[start + 1 :])
    else:
        module, *rest = arguments[start + 1 :]
        {"dia_diffusion.train": read_training, "dia_diffusion.cli": read_dia}[module](rest)


def read_script(arguments):
    """A script of the repository: it is there, and knows the options."""
    if arguments[0] == "-m":
        assert arguments[1] == "pytest"
        return assert_there(arguments)
    text = (ROOT / arguments[0]).read_text()
    assert_there(arguments)
    # Behind `--` come options of another command.
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert all(f'"{word.partition("=")[0]}"' in text for word in arguments[1:] if word.startswith("--"))


def read_make(arguments):
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in arguments)


def read_install(arguments):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = [extra for word in arguments for extra in re.findall(r"\[(.*?)\]", word)]
    assert set(extras) <= set(known)


READERS = {
    "dia": read_dia,
    "accelerate": read_launch,
    "python": read_script,
    "make": read_make,
    "pip": read_install,
    "git": lambda arguments: None,
    "ray": lambda arguments: None,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_documented_command_is_understood(words, somewhere):
    READERS[Path(words[0]).name](words[1:])


# What is put at the end of a command, so that it is quick: of an option that stands twice the last counts.
QUICK = {
    "sample": ["--num_images", "4", "--steps", "2"],
    "evaluate": ["--num_images", "20", "--steps", "2"],
    "analyze": ["--num_images", "8"],
}


def is_quick(words):
    return words[0] == "dia" and words[1] in QUICK and words[2] == "runs/digits"


@pytest.mark.parametrize("words", [one for one in COMMANDS if is_quick(one.values[0])])
def test_a_quick_command_runs(words, somewhere):
    assert main([*words[1:], *QUICK[words[1]]]) == 0
    names = [words[i + 1] for i, word in enumerate(words) if word in ("--output_dir", "--output", "--report")]
    assert names
    assert all((somewhere / name).exists() for name in names)


def known_options(capsys):
    """All options of all commands, of the scripts, and of the others'."""
    parsers = [make_parser()]
    parsers += next(action.choices for action in parsers[0]._actions if hasattr(action, "_parser_class")).values()
    known = {option for parser in parsers for option in parser._option_string_actions}
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for folder in ("examples", "benchmarks", "tools", "studies"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    return known.union(*OTHERS.values())


def test_no_page_names_an_option_that_there_is_not(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # No option is broken in two.
    known = known_options(capsys)
    assert "--learning_rate" in known
    named = {
        (page.name, option) for page in PAGES for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())
    }
    # `--dia_*` stands for all that begin so.
    unknown = {(page, name) for page, name in named if name not in known and name != "--dia_"}
    assert not unknown


def mapped_modules():
    """The modules that CONTRIBUTING.md's map names, with their paths from the indentation."""
    block = re.search(r"^## The rooms.*?```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]
    folders = {}
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        if folder := re.match(r" *(\w+)/(?!\w)", line):
            folders = {indent: name for indent, name in folders.items() if indent < depth} | {depth: folder[1]}
        names = re.match(r" *(\w+\.py(?:, \w+\.py)*)(?:  | *$)", line)
        for name in names[1].split(", ") if names else ():
            yield "/".join([folders[indent] for indent in sorted(folders) if indent < depth] + [name])


def test_the_map_names_every_module():
    package = {path for folder in ("dia_diffusion", "pipelines") for path in (ROOT / folder).rglob("*.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in package if path.name != "__init__.py"}
    mapped = {path.replace("dia_diffusion/pipelines/", "pipelines/") for path in mapped_modules()} - {"train_unet.py"}
    assert sorted(modules - mapped) == [], "name these in the map of CONTRIBUTING.md"
    assert sorted(mapped - modules) == [], "take these off the map of CONTRIBUTING.md"


def test_the_address_of_the_repository_is_that_of_the_project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for page in PAGES:
        assert set(re.findall(r"https://\S+/dia-diffusion\b", page.read_text())) <= {address}, page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def paragraphs(page):
    """The paragraphs and list items of a page, without code, tables, headings and links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for block in re.split(r"\n\n+|\n(?=- )", text):
        if not re.match(r"\||#|    ", block.lstrip("\n")):
            yield re.sub(
                r"`[^`]*`|\]\([^)]*\)|arXiv:? ?\d{4}\.\d{5}|(?:torch|Stable Diffusion|pytorch) \d\.\d+", "", block
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_paragraph_holds_at_most_three_figures(page):
    """More go into a table. Intervals count, dates, versions and sizes of images do not."""
    crowded = [block for block in paragraphs(page) if len(re.findall(r"\d+\.\d+|\d+%", block)) > 3]
    assert not crowded


def test_the_reference_has_every_public_name_with_an_example():
    """The examples of models run; those of the commands are in their docstrings."""
    import dia_diffusion

    text = (ROOT / "docs" / "reference.md").read_text()
    for name in set(dia_diffusion.__all__) - {"__version__"}:
        assert re.search(rf"^::: [\w.]+\.{name}$", text, re.M), name
        assert (
            name in "".join(re.findall(r"```python\n(.*?)```", text, re.S))
            or "```python" in getattr(dia_diffusion, name).__doc__
        ), name


def test_the_examples_of_the_reference_run(somewhere):
    for code in re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "reference.md").read_text(), re.M | re.S):
        exec(code.replace("num_inference_steps=15", "num_inference_steps=2"), {})


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_files_that_documented_commands_leave_are_ignored_by_git():
    words = [one.values[0] for one in COMMANDS]
    names = {
        line[i + 1]
        for line in words
        for i, word in enumerate(line[:-1])
        if word in ("--output_dir", "--output", "--report")
    }
    assert len(names) >= 5
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert set(ignored.stdout.split()) == names
