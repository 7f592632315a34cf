import json
import shutil

import pytest

from whalefall.data.dataset import PreparedSummary
from whalefall.errors import UserError
from whalefall.integrity import write_manifest


def test_a_card_survives_saving_and_loading(prepared, tmp_path):
    card = PreparedSummary.load(prepared)
    card.save(tmp_path)
    write_manifest(tmp_path, ["dataset.json"])
    assert PreparedSummary.load(tmp_path) == card


def test_a_card_of_another_version_is_refused(prepared, tmp_path):
    shutil.copy(prepared / "dataset.json", tmp_path)
    values = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(values | {"format": 2}))
    write_manifest(tmp_path, ["dataset.json"])
    with pytest.raises(UserError, match=r"dataset\.json is of another version: format is 2"):
        PreparedSummary.load(tmp_path)
