"""Compare the vocabularies of two models, token by token and not only by size."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class VocabularyMatch:
    """The result of comparing the token ids of a student and a teacher.

    Args:
        shared_size: Ids 0 to `shared_size - 1` have a row in both heads: the range both logits are sliced to.
        moved: Tokens with different ids in student and teacher: (token, student's id, teacher's id).
        only_student: Tokens that the teacher does not know, by id.
        only_teacher: Tokens that the student does not know, by id.
    """

    shared_size: int
    moved: tuple[tuple[str, int, int], ...] = ()
    only_student: tuple[str, ...] = ()
    only_teacher: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Every token has the same id on both sides; heads may still differ in rows that no token uses."""
        return not (self.moved or self.only_student or self.only_teacher)

    def require_identical(self) -> int:
        """Return `shared_size`, or raise a `ValueError` with examples of differing tokens."""
        if self.identical:
            return self.shared_size
        differences = []
        if self.moved:
            examples = ", ".join(f"{token!r} is {ours} and {theirs}" for token, ours, theirs in self.moved[:3])
            differences.append(f"{len(self.moved)} tokens have different ids (student and teacher: {examples})")
        for side, tokens in (("student", self.only_student), ("teacher", self.only_teacher)):
            if tokens:
                examples = ", ".join(repr(token) for token in tokens[:3])
                differences.append(f"{len(tokens)} tokens exist only in the {side} ({examples})")
        raise ValueError(
            "Student and teacher have different vocabularies, so their logits cannot be compared token by token: "
            f"{'; '.join(differences)}. Use two models of one family, or trim the tokenizer once for both. "
            "Models of different families need a cross-tokenizer loss; this trainer does not use those of "
            "`losses.spans` yet."
        )


def compare_vocabularies(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_size: int,
    teacher_size: int,
) -> VocabularyMatch:
    """Compare two token -> id maps. Heads of different sizes match if the extra rows do not belong to any token.

    For example, Qwen2.5 has 151,936 rows in its small and 152,064 in its large models for the same tokens.

    Args:
        student_size: Rows of the student's head (the last dimension of its logits).
        teacher_size: Rows of the teacher's head.

    Raises:
        ValueError: A head has fewer rows than its tokenizer has ids.
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    for side, vocabulary, size in (("student", ours, student_size), ("teacher", theirs, teacher_size)):
        if vocabulary and max(vocabulary.values()) >= size:
            raise ValueError(
                f"The tokenizer of the {side} has ids up to {max(vocabulary.values())}, but its head has {size} "
                "rows. Load model and tokenizer from the same folder, or resize the model's embeddings."
            )
    shared_size = min(student_size, teacher_size)
    if ours == theirs:
        return VocabularyMatch(shared_size)
    common = ours.keys() & theirs.keys()
    moved = sorted(((t, ours[t], theirs[t]) for t in common if ours[t] != theirs[t]), key=lambda entry: entry[1])
    only_student = sorted(ours.keys() - common, key=ours.__getitem__)
    only_teacher = sorted(theirs.keys() - common, key=theirs.__getitem__)
    return VocabularyMatch(shared_size, tuple(moved), tuple(only_student), tuple(only_teacher))
