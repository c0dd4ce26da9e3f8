"""tools/benchmark_routing_stats.py: it measures the hook in a training."""

import re

from helpers import load_tool


def test_it_prints_the_share(data, configs, write_config, capsys):
    tool = load_tool('benchmark_routing_stats')
    config = str(write_config(configs['mmpretrain'](data)))
    assert tool.main([config, '--steps', '4', '--interval', '2']) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(
        r'4 steps, recorded every 2: median step ([\d.]+) ms, a record '
        r'([\d.]+) ms, the hook takes ([\d.]+)% of all steps', line)
    assert found, line
    step, record, share = map(float, found.groups())
    assert step > 0 and record > 0 and 0 < share < 100


def test_the_clock_and_the_hook_agree_on_a_slow_record(data, configs,
                                                       write_config,
                                                       monkeypatch, capsys):
    """A hook that takes 0.2 s a layer is found to be that slow."""
    tool = load_tool('benchmark_routing_stats')
    look = tool.RoutingStatsHook._look

    def slow(*args, **kwargs):
        tool.time.sleep(0.2)
        return look(*args, **kwargs)

    monkeypatch.setattr(tool.RoutingStatsHook, '_look', slow)
    cfg = tool.read_config(str(write_config(configs['mmpretrain'](data))))
    cfg.work_dir = str(data / 'unused')
    found = tool.measure(cfg, 2, 1)
    assert found['record_s'] > 0.8  # four layers
    assert 0.3 < found['share'] < 1


def test_bad_input(tmp_path, capsys):
    tool = load_tool('benchmark_routing_stats')
    assert tool.main([str(tmp_path / 'no.py')]) == 1
    assert 'does not exist' in capsys.readouterr().err
    assert tool.main(['x.py', '--steps', '3']) == 1
    assert '--steps 3 must be at least --interval 50' in (
        capsys.readouterr().err)
