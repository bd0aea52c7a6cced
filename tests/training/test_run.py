"""What train and evidence build alike."""

from fewshot.training.checkpoint import read

REVERSED = """
progress: {_target_: fewshot.training.record.Progress}
record:
  _target_: fewshot.training.record.Record
  val_every: ${val_every}
  select: ${select}
  val_tasks: ${val_tasks}
  test_every: ${test_every}
  test_curve_tasks: 992
  stop_at_accuracy: ${stop_at_accuracy}
  probes: ${probes}
cosine_similarity: {_target_: fewshot.training.record.CosineSimilarity, every: 2}
zero_head: {_target_: fewshot.training.zero_head.ZeroHead, enabled: "${oc.select:zeroing,${algo.zeroing}}"}
"""


def test_the_order_of_the_callbacks_is_the_programs_whatever_that_of_the_yaml_is(run, own_yaml, tmp_path):
    """The head is zeroed before anything is measured, and the classes are compared before a checkpoint is written."""
    own_yaml("callbacks/reversed", REVERSED)
    knobs = ("algo=zero", "dataset.tasks=one_task", "shots=2", "iterations=3", "val_every=1")
    usual = run(tmp_path / "usual", *knobs, "callbacks=cosine_similarity", "callbacks.cosine_similarity.every=2")
    other = run(tmp_path / "other", *knobs, "callbacks=reversed")
    for name in ("metrics.csv", "cosine_similarity.json"):
        assert (usual / name).read_bytes() == (other / name).read_bytes()
    for folder in (usual, other):
        last = read(folder / "checkpoints" / "last.ckpt")
        assert not last["state_dict"]["network.head.weight"].any()
        assert last["callbacks"]["CosineSimilarity"]["updates"] == [1, 3]
