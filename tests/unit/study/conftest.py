import pytest
import yaml

from speft_ds.study.execute import Execution
from speft_ds.study.runs import Grid
from speft_ds.study.study_config import load_study
from unit.written import MINIMAL

STUDY = {
    "recipe": "./mine.yaml",
    "set": {"eval.validation": "rows.jsonl"},
    "variants": {"gradient": None, "random": {"mask.salience": "random"}},
    "axes": {"mask.density": [0.01, 0.1]},
    "seeds": [1, 2, 3],
    "reference": "random",
}


@pytest.fixture
def write(own_folder, tmp_path):
    """write(changes): the path of a study's file, beside its recipe; a key of None is left out."""
    (tmp_path / "mine.yaml").write_text(MINIMAL)

    def written(**changes):
        values = {key: value for key, value in (STUDY | changes).items() if value is not None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "study.yaml"

    return written


@pytest.fixture
def execution(write, tmp_path):
    """execution(changes): that of a study in tmp_path/out, before anything ran."""
    return lambda **changes: Execution(Grid(load_study(write(**changes))), tmp_path / "out", {})
