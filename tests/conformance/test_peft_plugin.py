"""What `make test-peft` leaves out, and that its table of exceptions cannot go stale."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peft import LoraConfig

from conformance import peft_plugin
from remix_model import ReMixConfig


def make_item(name, *given):
    params = SimpleNamespace(params=dict(enumerate(given)))
    item = SimpleNamespace(name=name, callspec=params, module=SimpleNamespace(), marks=[])
    item.add_marker = item.marks.append
    return item


@pytest.fixture
def collect(monkeypatch):
    """collect(exceptions, items): the items that are left, and those that were left out."""

    def run(exceptions, items):
        monkeypatch.setattr(peft_plugin, "EXPECTED_FAILURES", exceptions)
        out = []
        hook = SimpleNamespace(pytest_deselected=lambda items: out.extend(items))
        peft_plugin.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        return items, out

    return run


def test_exceptions_have_to_fail_and_other_methods_are_left_out(collect):
    ours = [make_item("test_merge[a]", ReMixConfig), make_item("test_load[a]", ReMixConfig())]
    other = make_item("test_merge[b]", LoraConfig)
    left, out = collect([("test_merge*", OSError, "why")], [*ours, other])
    assert (left, out) == (ours, [other])
    (mark,) = ours[0].marks
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "why", "raises": OSError, "strict": True}
    assert not ours[1].marks
    assert (
        ours[0].module.set_init_weights_false(ReMixConfig, {"r": 2})["init_lora_weights"] is False
    )


def test_an_exception_for_no_test_is_an_error(collect):
    with pytest.raises(pytest.UsageError, match=r"'test_gone\*', which is no test"):
        collect([("test_gone*", OSError, "why")], [make_item("test_load[a]", ReMixConfig)])


def test_cases_stand_for_those_of_other_methods():
    def test_load(config_cls):
        """As PEFT's."""

    mark = pytest.mark.parametrize("config_cls", [LoraConfig]).mark
    untouched = pytest.mark.parametrize("dtype", [1, 2]).mark
    definition = SimpleNamespace(own_markers=[untouched, mark])
    peft_plugin.pytest_generate_tests(
        SimpleNamespace(definition=definition, function=test_load, module=pytest)
    )
    assert definition.own_markers[0] is untouched
    assert definition.own_markers[1].args == ("config_cls", [ReMixConfig])
