"""The tokens of one sample by column, before they are padded to a batch."""

import torch

Row = dict[str, torch.Tensor]  # a value for each token by column: (tokens, ...), "input_ids" among them


def extended(row: Row, answer: list[int]) -> Row:
    """The row with the answer; in other columns the answer's tokens are what the prompt's last token is: text."""
    columns = {
        name: torch.cat([value, value[-1:].expand(len(answer), *value.shape[1:])]) for name, value in row.items()
    }
    return {**columns, "input_ids": torch.cat([row["input_ids"], torch.tensor(answer)])}


def filled(rows: list[Row]) -> list[Row]:
    """The rows with the same columns; one that only some rows have is 0 in the others."""
    columns = {name: value for row in rows for name, value in row.items()}
    return [
        {
            name: row[name] if name in row else value.new_zeros(len(row["input_ids"]), *value.shape[1:])
            for name, value in columns.items()
        }
        for row in rows
    ]
