"""docs/check_data.md: its commands run, and its table is that of the code."""

import json
import re

from guides import ROOT, run_guide

from mmrpa.data_checks.findings import NOTES, PROBLEMS


def test_commands(sample, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/sample').symlink_to(sample)
    outputs = list(run_guide('docs/check_data.md', tmp_path).values())
    assert len(outputs) == 3
    assert 'no problem(s), 24 images in 2 dataset(s)' in outputs[0]
    assert re.search(r'triangle +\d+ pixels in \d+ images', outputs[1])
    assert json.loads((tmp_path / 'report.json').read_text())['problems'] == []
    assert 'no problem(s), 15 images in 2 dataset(s)' in outputs[2]


def test_table():
    text = (ROOT / 'docs/check_data.md').read_text()
    rows = re.findall(r'^\| `([a-z-]+)` \| (.*) \| (.*) \|$', text, re.M)
    assert rows == [(code, *kind) for code, kind in PROBLEMS.items()]
    notes = re.findall(r'^- `([a-z-]+)`: (.*)$', text, re.M)
    assert dict(notes) == NOTES
