"""Codes of one id feature: from raw ids, whatever type they came as, to rows of its table."""

from collections.abc import Sequence

import numpy as np

from model.contract.columns import Column, Ids, Ragged, compact_ids, map_id, map_ids
from model.contract.ids import canonical_id, hash_id
from model.contract.spec import FIRST_CODE, MISSING_CODE, UNKNOWN_CODE, Categorical, Hashed


class IdCodes:
    """The codes of a categorical or hashed feature. Immutable."""

    def __init__(self, feature: Categorical | Hashed, vocabulary: Sequence[str]) -> None:
        self._name = feature.name
        self._default = canonical_id(feature.default)
        self._num_buckets = feature.num_buckets if isinstance(feature, Hashed) else 0
        self._vocabulary = {value: FIRST_CODE + i for i, value in enumerate(vocabulary)}
        self.table_size = FIRST_CODE + (self._num_buckets or len(vocabulary))

    def code(self, value: object) -> int:
        """The code of one raw value.

        Raises:
            TypeError: the value is no id.
            UnicodeEncodeError: a text that is none.
        """
        canonical = canonical_id(value) or self._default
        if canonical is None:
            return MISSING_CODE
        if self._num_buckets:
            return FIRST_CODE + hash_id(canonical) % self._num_buckets
        return self._vocabulary.get(canonical, UNKNOWN_CODE)

    def one(self, value: object) -> int:
        """`code`, with its errors named.

        Raises:
            EncodeError: the value is no id.
        """
        # Most values are texts or integers of the vocabulary, which are found as they are.
        if type(value) is int:
            code = self._vocabulary.get(str(value))
        else:
            code = self._vocabulary.get(value) if isinstance(value, str) else None
        return map_id(self._name, value, self.code) if code is None else code

    def many(self, column: Column | Ragged) -> Ids:
        """Codes of a column, int64 [n].

        Raises:
            EncodeError: a value is no id.
        """
        if isinstance(column, list) and len(column) > 1:
            known = self._known(column)
            if known is not None:
                return known
            column = compact_ids(column)
        return map_ids(self._name, column, self.code, null=self.code(None))

    def _known(self, column: list[object]) -> Ids | None:
        # Most columns hold nothing but texts of the vocabulary, which are found as they are.
        try:
            return np.fromiter(
                map(self._vocabulary.__getitem__, column),  # type: ignore[arg-type]  # any key may be asked for
                np.int64,
                len(column),
            )
        except (KeyError, TypeError):  # a TypeError for an object or list: refused by `map_ids`
            return None
