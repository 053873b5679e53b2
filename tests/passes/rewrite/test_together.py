"""Models whose tokens of one call see each other are told from those that read in order."""

from kvmix_compile.passes.rewrite.together import reads_together
from tests.helpers.one_capture import captured_once, zoo
from tests.helpers.toy_multimodal import FAMILIES


def test_a_prefix_is_read_together_and_a_text_in_order() -> None:
    assert reads_together(captured_once(FAMILIES["paligemma"].toy()))
    assert not reads_together(captured_once(zoo("llama")))
