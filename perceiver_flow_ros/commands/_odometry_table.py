# SPDX-License-Identifier: Apache-2.0
"""What the command odometry prints."""

from __future__ import annotations


def table(report: dict) -> str:
    """Lay the report out for people."""
    lines = [
        f'{report["sequence"]} ({report["layout"]}, {report["frames"]} frames), flow: '
        f'{report["model"]}; medians over pairs',
        '',
        f'{"":39}  {"rotation":>10}  {"direction":>10}  {"translation":>11}',
    ]
    for row in report['gaps']:
        apart = f'{row["gap"]} frame{"s" if row["gap"] > 1 else ""} apart'
        plain = 'PnP' if row['scale'] == 'depth' else 'five-point'
        for name, of in (('ours', 'ours'), (f'OpenCV {plain} RANSAC', 'opencv')):
            figures = row[of]
            if not figures:
                continue
            line = f'{apart + ", " + name:39}  {figures["rotation_deg"]:6.3f} deg'
            angle = figures['direction_deg']
            line += '           -' if angle is None else f'  {angle:6.2f} deg'
            if 'translation_mm' in figures:
                line += f'  {figures["translation_mm"]:8.1f} mm'
            lines.append(line)
    for row in report['gaps']:
        kinds = ', '.join(f'{n} {kind}' for kind, n in row['kinds'].items())
        lines += [
            '',
            f'{row["gap"]} apart: {row["pairs"]} pairs, {row["valid"]} valid ({kinds}), '
            f'{1e3 * row["seconds"]:.1f} ms of CPU a pair without the flow',
        ]
        if row['deviation'] is not None:
            lines.append(
                f'squared error of the rotation: {row["deviation"]:.2f} times what the covariance '
                'tells'
            )
        if row['slopes']:
            of = row['slopes']
            lines.append(
                f'rotations, slopes: true on estimated {of["true_on_estimated"]:.2f}, estimated '
                f'on true {of["estimated_on_true"]:.2f}: noise of the estimates '
                f'{of["noise_estimated_deg"]:.2f}, of the true poses {of["noise_true_deg"]:.2f} '
                'deg RMS'
            )
        if 'distance_error' in row:
            lines.append(
                f'metres from the camera height on {row["metric"]} pairs: distance '
                f'{100 * row["distance_error"]:+.1f} %, speed {100 * row["speed_error"]:.1f} % '
                '(median of a pair)'
            )
    loop = report['closure']
    if loop['pairs']:
        lines += [
            '',
            'without the true poses: the rotation over two frames differs from those of one by '
            f'{loop["rotation_deg"]:.3f} deg;',
            f'squared that is {loop["deviation"]:.2f} times what the covariances tell '
            f'({loop["pairs"]} pairs)',
        ]
    return '\n'.join(lines)
