"""RoutingStatsHook in distributed training."""


def test_the_first_process_reports(data, configs, write_config, run_tool,
                                   tmp_path):
    config = configs['mmpretrain'](data)
    config['custom_hooks'] = [dict(type='mmrpa.RoutingStatsHook', interval=2)]
    config['model']['backbone']['with_cp'] = True
    config['val_dataloader'] = config['val_evaluator'] = None
    config['val_cfg'] = None
    config['train_cfg'] = dict(type='IterBasedTrainLoop', max_iters=2)
    done = run_tool('dist_train.sh', write_config(config), 2, '--work-dir',
                    tmp_path / 'run')
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('max mass') == 1
    assert done.stdout.count('\nstage4 ') == 1
