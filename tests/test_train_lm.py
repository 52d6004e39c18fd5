"""The language model of examples/train_lm.py, small: both trainings agree, and one saves memory."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_lm.py"


@pytest.fixture(scope="module")
def lm():
    pytest.importorskip("matplotlib").use("Agg")
    spec = importlib.util.spec_from_file_location("lossops_train_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lossops_train_lm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lossops_train_lm"]


@pytest.fixture
def cache(lm, tmp_path):
    """Tokens that follow each other in a circle, which is soon learnt."""

    def make(vocabulary):
        tokens = torch.arange(4096) * 7 % vocabulary
        path = tmp_path / "tokens.pt"
        torch.save(lm.Text(vocabulary, tokens, tokens.clone())._asdict(), path)
        return path

    return make


@pytest.fixture
def make_run(lm):
    def make(training, validation):
        return lm.Run(4, training, [len(training)], validation, [0.1] * len(training), 1.0)

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_both_train_alike(lm, cache, tied):
    trainings = [lm.Training(contender, cache(50), tied) for contender in lm.CONTENDERS]
    for last in (3, 6, 8):
        ours, theirs = (training.advance(last) for training in trainings)
    torch.testing.assert_close(ours.training, theirs.training, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.validation, theirs.validation, rtol=1e-5, atol=1e-5)
    assert len(ours.training) == len(ours.seconds) == 8
    assert len(ours.validation) == 3 and ours.steps == [3, 6, 8]
    assert ours.training[-1] < ours.training[0] and ours.validation[-1] < ours.validation[0]
    assert len(set(ours.training)) == 8  # each step has a batch of its own


def test_a_tied_head_is_the_embedding(lm):
    tied, untied = (lm.LanguageModel(50, tied) for tied in (True, False))
    assert tied.head.weight is tied.token.weight
    assert untied.head.weight is not untied.token.weight


def test_the_model_does_not_look_ahead(lm):
    model = lm.LanguageModel(50, False)
    tokens = torch.arange(20).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 10:] += 7
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_one_saves_the_memory_of_the_logits(lm, cache):
    vocabulary = 16384
    ours, theirs = (
        lm.Training(contender, cache(vocabulary), False).advance(2) for contender in lm.CONTENDERS
    )
    logits = lm.SEQUENCES * (lm.LENGTH - 1) * vocabulary * 4 / 1e6
    assert theirs.peak > 2 * logits  # them and their gradient
    assert 0 < ours.peak < theirs.peak - 1.5 * logits


def test_training_means_are_of_the_batches_since_the_last_validation(lm):
    run = lm.Run(training=[5.0, 3.0, 2.0, 4.0, 1.0], steps=[2, 4, 5])
    assert run.training_means() == [4.0, 3.0, 1.0]


def test_curves_within_the_tolerance_pass(lm, make_run, capsys):
    runs = {lm.OURS: make_run([5.0, 4.0], [4.0]), lm.THEIRS: make_run([5.0, 4.0005], [4.0])}
    lm.check(runs)
    out = capsys.readouterr().out
    assert "training loss 5.0e-04, validation loss 0.0e+00" in out and "within rounding" in out


@pytest.mark.parametrize(
    ("training", "validation"),
    [([5.2, 4.0], [4.0]), ([5.0, 4.0], [4.2]), ([5.0, float("nan")], [4.0]), ([5.0, 4.0], [float("nan")])],
)
def test_curves_apart_are_an_error(lm, make_run, training, validation):
    runs = {lm.OURS: make_run([5.0, 4.0], [4.0]), lm.THEIRS: make_run(training, validation)}
    with pytest.raises(SystemExit, match="the curves differ by more than"):
        lm.check(runs)


def test_the_text_is_told_apart_by_files(lm):
    training, held_out = lm.standard_library(25)
    assert (len(training), len(held_out)) == (23, 2)
    assert not set(training) & set(held_out)
    tokenizer = lm.train_tokenizer(training, 600)
    assert tokenizer.get_vocab_size() == 600
    tokens = lm.encode(tokenizer, held_out, "held out").tolist()
    end = tokenizer.token_to_id(lm.END_OF_FILE)
    assert tokens.count(end) == 2 and tokens[-1] == end
    assert tokenizer.decode(tokens[: tokens.index(end)]) == held_out[0]


def test_too_little_text_is_said_in_a_sentence(lm, monkeypatch, tmp_path):
    monkeypatch.setattr(lm.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"expected at least 10 Python files in .*, found 0"):
        lm.standard_library(None)


def test_a_run_draws_its_pictures_and_prints_its_figures(lm, tmp_path):
    out = tmp_path / "a" / "b"
    options = ["--steps", "3", "--vocab", "600", "--files", "25", "--tied", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for picture in ("lm-loss.png", "lm-memory.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    for contender in lm.CONTENDERS:
        figures = re.search(
            rf"^{re.escape(contender)} +(\S+) +(\S+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE
        )
        assert figures and all(float(figure) > 0 for figure in figures.groups())
    assert "The two curves are the same within rounding" in done.stdout
    assert done.stdout.splitlines()[-1] == f"The pictures are in {out}"
