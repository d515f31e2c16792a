"""The hash chain and its index."""

from kvfold.cache.prefix import PrefixIndex


def test_roots_separate_model_salt_adapter_and_tenant():
    roots = [
        PrefixIndex(identity, salt).root(generation, tenant)
        for identity in ("m", "n")
        for salt in ((), ("a", "b"), ("ab",))
        for generation in (b"", b"g")
        for tenant in ("", "t")
    ]
    assert len(set(roots)) == len(roots)


def test_keys_depend_on_the_whole_prefix():
    index = PrefixIndex("m", ())
    root = index.root(b"", "")
    one = index.extend(root, [1, 2])
    assert one != index.extend(root, [2, 1])
    assert index.extend(one, [3, 4]) != index.extend(index.extend(root, [2, 1]), [3, 4])


def test_the_first_page_published_stays_and_can_be_forgotten():
    index = PrefixIndex("m", ())
    key = index.extend(index.root(b"", ""), [1, 2])
    index.publish(key, [1, 2], 5)
    index.publish(key, [1, 2], 6)
    assert index.find(key, [1, 2]) == 5
    assert (index.holds(5), index.holds(6)) == (True, False)
    index.forget(5)
    assert index.find(key, [1, 2]) is None


def test_a_collision_serves_nobody():
    index = PrefixIndex("m", ())
    key = index.extend(index.root(b"", ""), [1, 2])
    index.publish(key, [1, 2], 5)
    assert index.find(key, [1, 3]) is None
