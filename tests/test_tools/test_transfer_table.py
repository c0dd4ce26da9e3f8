"""The measuring tool: what it runs, keeps, and writes."""

import json

import pytest
from helpers import load_tool

REPORT = dict(
    epochs=dict(teacher=5, tune=1, layer=2, feature=3),
    seeds={
        str(seed): {
            'teacher': dict(top1=0.8 + 0.2 * seed, seconds=50),
            'convert': dict(top1=0.2, seconds=1),
            'calibrate': dict(top1=0.5 + 0.1 * seed, seconds=3),
            'align': dict(top1=0.7, seconds=20),
            'tune-convert': dict(top1=0.6, seconds=10),
            'tune-calibrate': dict(top1=0.7, seconds=11),
            'tune-align': dict(top1=0.9, seconds=12),
            'scratch-4': dict(top1=0.45, seconds=40 + seed),
        } for seed in (0, 1)
    })


@pytest.fixture(scope='module')
def tool():
    return load_tool('transfer_table')


def test_table_is_of_means_and_sums(tool):
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in tool.format_table(REPORT).splitlines()[2:]]
    numbers = {(row[0].split(',')[0][:9], row[1]): row[2:] for row in rows}
    assert len(numbers) == len(rows) == 8
    align = '2 + 3 epochs of alignment'
    assert numbers['teacher', '5 epochs'] == [
        '50', '0.900 (0.800, 1.000)', '100%']
    assert numbers['carried a', 'none'] == [
        '3', '0.550 (0.500, 0.600)', '61%']
    # The seconds of the start count.
    assert numbers['carried', f'{align}, 1 of fine-tuning'] == [
        '32', '0.900 (0.900, 0.900)', '100%']
    assert numbers['weights c', '1 of fine-tuning'][0] == '11'
    assert numbers['random we', '4 epochs'] == [
        '40', '0.450 (0.450, 0.450)', '50%']


def test_steps_that_are_done_are_not_done_again(tool, tmp_path, monkeypatch):
    args = tool.parse_args(['--seeds', '7', '--work-dir', str(tmp_path),
                            '--scratch-epochs', '2'])
    called = []

    def measure(name):

        def fake(self, folder, *needed):
            called.append((folder.name, *needed))
            if folder.name == 'tune-calibrate' and len(called) < 7:
                raise KeyboardInterrupt
            return dict(top1=0.5, seconds=len(called))

        monkeypatch.setattr(tool.Bench, name, fake)

    for name in ('train', 'convert', 'align'):
        measure(name)
    with pytest.raises(KeyboardInterrupt):
        tool.measure(args)
    first = list(called)
    report = tool.measure(args)
    start = tmp_path / 'seed7/calibrate/start.pth'
    again = ('tune-calibrate', 1, start, 'rp')
    assert first[-1] == again and called[len(first)] == again
    assert first[0] == ('teacher', 5, None, 'sr')
    assert called[-1] == ('scratch-2', 2, None, 'rp')
    assert len(called) == 9
    assert report['seeds']['7']['align'] == dict(top1=0.5, seconds=4)
    # Results of other settings are not taken for these.
    args.layer_epochs = 9
    with pytest.raises(tool.Failed, match='results of other settings'):
        tool.measure(args)


def test_page(tool, tmp_path, capsys):
    page, out = tmp_path / 'page.md', tmp_path / 'report.json'
    marks = [tool.MARK.format(m) for m in ('start', 'end')]
    page.write_text(f'before\n{marks[0]}\nold\n{marks[1]}\nafter\n')
    out.write_text(json.dumps(REPORT))
    command = ['--only-doc', '--out', str(out), '--doc', str(page)]
    assert tool.main(command) == 0
    text = page.read_text()
    assert text.startswith(f'before\n{marks[0]}\n| start | training')
    assert text.endswith(f'|\n{marks[1]}\nafter\n') and 'old' not in text
    assert tool.main(command) == 0 and page.read_text() == text
    page.write_text('no marks')
    assert tool.main(command) == 1
    assert 'needs one line' in capsys.readouterr().err
    assert page.read_text() == 'no marks'


def test_bad_start(tool, tmp_path, capsys):
    assert tool.main(['--data', str(tmp_path / 'no')]) == 1
    assert 'make_sample_data.py' in capsys.readouterr().err
    assert tool.main(['--only-doc', '--out', str(tmp_path / 'no.json')]) == 1
    assert 'no.json' in capsys.readouterr().err


def test_page_in_docs_is_that_of_the_results(tool):
    report = json.loads((tool.ROOT / 'docs/attention_transfer.json'
                         ).read_text())
    page = (tool.ROOT / 'docs/attention_transfer.md').read_text()
    assert tool.format_table(report) in page
