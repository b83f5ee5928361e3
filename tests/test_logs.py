"""Warnings that are held back: in their order, of one thread, and whatever the level of the logger."""

import logging
import threading

from metaopt import _logs


def test_warnings_are_held_back_in_one_thread_only(caplog):
    log = _logs.Log(logging.getLogger("metaopt.test"))
    caplog.set_level(logging.INFO, "metaopt.test")
    with _logs.hold_back() as outer:
        log.warning("a %d", 1)
        log.info("hidden")
        with _logs.hold_back() as within:
            log.warning("100 %")
        thread = threading.Thread(target=lambda: log.warning("other thread"))
        thread.start()
        thread.join()
        logging.getLogger("metaopt.test").setLevel(logging.ERROR)
        log.warning("last")
    log.warning("below the level")
    log.error("after")
    assert (outer, within) == (["a 1", "last"], ["100 %"])
    assert caplog.messages == ["other thread", "after"]
    assert caplog.records[-1].filename == "test_logs.py"
