"""Which problems of the training data are those of an evaluation set."""

import pytest

from recipe.asyppo.data.decontamination import Fingerprint, Index, is_near


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"Find $\dfrac{1}{2}+ x$ if $x \leq 3$.", r"find \(\frac{1}{2} + x\) if \( x\le 3 \)", "same"),
        ("Compute 2+3 now.", "Compute 2-3 now.", None),
        (
            "What is the sum of all the primes between 10 and 50?",
            "What is the sum of all the primes between 10 and 60?",
            None,
        ),
        (
            r"Find the coefficient of \(x^{10}\) in \(f(f(x))\), where \(f(x) = x + x^2 + x^4 + x^8 + x^{16} + x^{32}\).",
            r"Let $f(x)=x^{1}+x^{2}+x^{4}+x^{8}+x^{16}+x^{32}$. Compute the coefficient of $x^{10}$ in $f(f(x))$.",
            "nearly",
        ),
        (  # a story around it does not make it another problem: half of the shorter one counts
            "How many ways are there to seat 5 people around a table with 8 chairs?",
            "On a rainy day the whole club comes late to its dinner, wet and hungry, and nobody wants to sit by the window. "
            "How many ways are there to seat 5 people around a table with 8 chairs? Give all the steps of your reasoning.",
            "nearly",
        ),
        (  # a number or a source around it, of which a text with few numbers must not make another problem
            "Problem 11. How many ways are there to seat 5 people around a table with 8 chairs? (AIME 2024 I)",
            "How many ways are there to seat 5 people around a table with 8 chairs?",
            "nearly",
        ),
        (
            "The answer is m/n where m and n are relatively prime positive integers. Find m+n for a die.",
            "The answer is m/n where m and n are relatively prime positive integers. Find m+n for 7 red and 9 blue coins.",
            None,
        ),
    ],
)
def test_what_counts_as_the_same_problem(one, other, same):
    found = Index([("set", other)]).find(one)
    assert (found and found[0]) == same
    assert is_near(Fingerprint.of(one), Fingerprint.of(other)) == is_near(Fingerprint.of(other), Fingerprint.of(one))


def test_the_index_finds_what_comparing_all_pairs_finds():
    """Plain-loop oracle."""
    problems = [f"Tom has {a} nuts and gives {b} of them to each of his {c} friends; how many are left for {n}?"
                for a in (3, 4) for b in (5, 6) for c in (7, 8) for n in ("him", "his sister Ann")]  # fmt: skip
    known, asked = problems[::3], problems[1::3]
    index = Index([(str(number), text) for number, text in enumerate(known)])
    for text in asked:
        near = {str(n) for n, other in enumerate(known) if is_near(Fingerprint.of(text), Fingerprint.of(other))}
        found = index.find(text)
        assert (found is not None) == bool(near) and (found is None or found[1] in near)
    assert sum(index.find(text) is not None for text in asked) > 0
