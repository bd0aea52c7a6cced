"""Trains, validates, tests and reports: python train.py algo=somaml +zeroing=true, likewise python -m fewshot.train"""

from omegaconf import DictConfig

from fewshot.config.check import check, processes
from fewshot.config.hydra_call import Call, carry_out, hydra_command
from fewshot.processes import ranks
from fewshot.results.record_files import announce, read, tell_result, validation_accuracy


@hydra_command
def main(cfg: DictConfig) -> float:
    return carry_out(cfg, run)  # with mistakes in one line, the folder's lock, signals


def run(cfg: DictConfig, call: Call) -> float:
    """Returns the validation accuracy of the model that was tested, after inner_steps."""
    announce(call.folder, cfg)
    from fewshot.training.runtime import import_lightning  # torch takes seconds, for which no mistake has to wait

    import_lightning(cfg, call.folder)
    from fewshot.training.resume import find_start
    from fewshot.training.run import Run, finished
    from fewshot.training.wandb_run import finished_run

    start = find_start(cfg, call.overrides, call.folder)  # a new run, one that goes on, or the test of a checkpoint
    check(start.cfg)
    if finished(start) or ranks.start("fewshot.train", call.overrides, call.folder, processes(start.cfg)):
        return validation_accuracy(read(call.folder))
    with finished_run():
        built = Run.build(start, call.signals, call.began)  # tasks, learner and trainer; evidence builds the same
        results = built.fit().test().write()
    tell_result(results)  # W&B has said all that it has to say
    return validation_accuracy(results)


if __name__ == "__main__":
    main()
