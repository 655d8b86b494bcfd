"""Losses. `language` holds what a lane's answer costs, `ponder` joins it with the halting rule."""
