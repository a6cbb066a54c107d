"""A setting that a later version adds changes no hash and no identity while it is at its default."""

from dataclasses import dataclass

from flowmap.base.schema import added, construct, short_hash, to_plain


@dataclass(frozen=True)
class Before:
    size: int = 3


@dataclass(frozen=True)
class Now:
    size: int = 3
    wide: bool = added(False)


def test_at_its_default_it_is_in_no_hash():
    assert to_plain(Now(), {}) == {"size": 3, "wide": False}
    assert to_plain(Now(), {}, hashed=True) == to_plain(Before(), {})
    assert short_hash(to_plain((Now(),), {}, hashed=True)) == short_hash(to_plain((Before(),), {}))


def test_set_it_is_in_the_hash():
    assert to_plain(Now(wide=True), {}, hashed=True) == {"size": 3, "wide": True}


def test_files_may_name_it_or_not():
    assert construct(Now, {"size": 4}, {}, file="a") == Now(4)
    assert construct(Now, {"wide": True}, {}, file="a") == Now(wide=True)


@dataclass(frozen=True)
class WithoutEffect:
    size: int = 3
    wide: bool = added(False, hashed=False)


def test_a_setting_that_changes_no_result_is_never_in_the_hash():
    assert to_plain(WithoutEffect(wide=True), {}, hashed=True) == {"size": 3}
    assert to_plain(WithoutEffect(wide=True), {}) == {"size": 3, "wide": True}
