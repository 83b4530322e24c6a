"""The card has the scores that `scores` computes, and a hub gets the folder or says in one line why not."""

import huggingface_hub
import pytest

from featcache.dataset.algonauts import open_challenge
from featcache.errors import FeatcacheError, StoreError
from heads.config import ScoresConfig
from heads.encoder.export import export_work, push
from heads.encoder.folder import CARD, DESCRIPTION, load_encoder
from heads.encoder.work import encoder_of_work
from heads.scores.metrics import ALL_SURFACES
from heads.statistics.run import score_models


def table_of(text):
    """{(subject, ROI, model): (number of vertices, score)} of the table of scores in a card."""
    lines = text[text.index("## Scores") : text.index("## Made of")].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| subj")]
    return {tuple(row[:3]): (int(row[3].replace(",", "")), row[4]) for row in rows if row[0] != "subject"}


@pytest.mark.parametrize("which", ["blend", "one model"])
def test_the_scores_of_a_card_are_those_of_the_command(every_kind, exported, tiny, tmp_path, which):
    subjects = open_challenge(tiny).subjects
    folder, model = exported, "blend"
    if which == "one model":
        folder = tmp_path / "one"
        model = next(name for name in encoder_of_work(subjects, every_kind).models() if "test_vit" in name)
        export_work(subjects, every_kind, folder, model=model, data="of a test")
        assert "Data: of a test" in (folder / CARD).read_text() and load_encoder(folder).models() == [model]
    config = ScoresConfig(models=model.rpartition(" ")[2], permutations=0)
    found = score_models(subjects, config, every_kind).estimates
    measure = "accuracy" if any(one.measure == "accuracy" for one in found) else "r"
    expected = {
        (one.subject, one.roi, one.model): (one.n_vertices, f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f})")
        for one in found
        if one.measure == measure and one.surface == ALL_SURFACES and one.subject != "all"
    }
    assert {subject for subject, _, _ in expected} == {subject.name for subject in subjects}
    assert {name for _, _, name in expected} == {model}
    assert table_of((folder / CARD).read_text(encoding="utf-8")) == expected


class Hub:
    """What a push calls. fails : the call that fails, and how"""

    def __init__(self, **fails: Exception) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = fails

    def _called(self, name: str, *given: object) -> None:
        self.calls.append((name, *given))
        if name in self.fails:
            raise self.fails[name]

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> str:
        self._called("create", repo_id, exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: object) -> None:
        self._called("upload", repo_id, folder_path)


def test_a_push_uploads_the_folder_to_its_repository(exported, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert push(exported, "me/mine") == "https://hub/me/mine"
    assert hub.calls == [("create", "me/mine", True), ("upload", "me/mine", exported)]


class NoConnectionError(Exception):
    """What the library that speaks HTTP raises; it is no OSError."""


@pytest.mark.parametrize("call", ["create", "upload"])
@pytest.mark.parametrize("kind", [OSError, ValueError, NoConnectionError])
def test_what_the_hub_says_against_it_is_one_line(exported, monkeypatch, call, kind):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(**{call: kind("not\nallowed")}))
    with pytest.raises(FeatcacheError, match=r"--push-to-hub: .*found not; log in with 'hf auth login'") as caught:
        push(exported, "me/mine")
    assert "\n" not in str(caught.value) and (exported / DESCRIPTION).is_file()


def test_nothing_to_export_is_refused_and_leaves_nothing(tiny, tmp_path):
    with pytest.raises(StoreError, match="run 'extract' and 'fit-heads' first"):
        export_work(open_challenge(tiny).subjects, tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "out").exists()
