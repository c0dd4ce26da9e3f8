"""docs/swap.md: its commands run and print what it shows."""

import json
import re

from guides import ROOT, run_guide
from helpers import load_tool

PAGE = ROOT / 'docs/swap.md'


def test_commands(tmp_path):
    # training needs COCO; the survey takes an hour
    outputs = run_guide('docs/swap.md', tmp_path, skip=[
        'train.py', 'survey_swaps.py', 'update_swap_docs.py'])
    printed = '\n'.join(outputs.values())
    shown = re.search(r'```\n(.*?)```', PAGE.read_text(), re.S)[1]
    assert len(shown.splitlines()) == 3
    for line in shown.splitlines():
        # '...' stands for what the page leaves out
        pattern = re.escape(line).replace(re.escape('...'), '.*')
        assert re.search(f'^{pattern}$', printed, re.M), line
    assert (tmp_path / 'retinanet_rp.py').is_file()


def test_tables_are_those_of_the_survey():
    tool = load_tool('update_swap_docs')
    survey = json.loads((ROOT / 'docs/swap-survey.json').read_text())
    assert f'\n{tool.render(survey)}\n' in PAGE.read_text()


def test_nine_of_ten_configs_of_the_ten_families_run():
    groups = json.loads((ROOT / 'docs/swap-survey.json').read_text())['groups']
    families = [g for g in groups if g['outcome'] != 'unreadable'
                and g['family'] != 'other']
    ran = sum(g['configs'] for g in families if g['outcome'] == 'ran')
    assert ran >= 0.9 * sum(g['configs'] for g in families)
    assert not [g for g in families if g['outcome'] == 'failed']
