"""Functions whose lines the tests mend."""

import math


def plain(x):
    return math.log(x)  # plain


def outer(y):
    def inner(x):
        return x / y  # inner

    return inner


class Base:
    def scale(self):
        return 2


class Derived(Base):
    def scale(self):
        return super().scale() / 0  # super


def long(a, b):
    return sum(
        [
            a,
            a / b,  # long
        ]
    )


def ümlaut(größe):
    return größe / 0  # umlaut
