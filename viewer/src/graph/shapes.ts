/**
 * The WebGL programs: nodes, five shapes by their signed distance, with a ring around what is pinned or chosen; and lines.
 *
 * Neither is instanced, unlike sigma's own: software renderers take thousands of small instances one by one.
 */
import { EdgeProgram, NodeProgram, type ProgramInfo } from "sigma/rendering";
import type { EdgeDisplayData, NodeDisplayData, RenderParams } from "sigma/types";
import { floatColor } from "sigma/utils";
import type { Kind } from "./parse";

export const SHAPES: Record<Kind, number> = { feature: 0, token: 1, error: 2, bias: 3, rest: 3, logit: 4 };
export interface ShapedData extends NodeDisplayData {
  shape: number;
  ring: string;
  /** Thickness of the ring, as a share of the radius. */
  ringWidth: number;
}

// Sigma's colours have an opacity of 254 of 255 at most.
const OPAQUE = "(255.0 / 254.0)";
// What the vertex shader hands to the fragment shader.
const VARYINGS = /* glsl */ `varying vec4 v_color;
varying vec4 v_ring;
varying vec2 v_point;
varying float v_shape;
varying float v_ringWidth;
varying float v_pixel;
`;
const VERTEX = /* glsl */ `
attribute vec4 a_id;
attribute vec4 a_color;
attribute vec4 a_ring;
attribute vec2 a_position;
attribute float a_size;
attribute float a_shape;
attribute float a_ringWidth;
attribute vec2 a_corner;
uniform mat3 u_matrix;
uniform float u_sizeRatio;
uniform float u_correctionRatio;
${VARYINGS}void main() {
  float size = a_size * u_correctionRatio / u_sizeRatio * 4.0;
  vec2 position = a_position + size * a_corner;
  gl_Position = vec4((u_matrix * vec3(position, 1)).xy, 0, 1);
  v_point = a_corner;
  v_shape = a_shape;
  v_ringWidth = a_ringWidth;
  v_pixel = u_correctionRatio * 2.0 / size;
  v_ring = a_ring;
  v_ring.a *= ${OPAQUE};
  #ifdef PICKING_MODE
  v_color = a_id;
  #else
  v_color = a_color;
  #endif
  v_color.a *= ${OPAQUE};
}`;

const FRAGMENT = /* glsl */ `
precision highp float;
${VARYINGS}void main() {
  vec2 p = v_point;
  vec2 q = abs(p);
  float d;
  if (v_shape < 0.5) d = length(p) - 0.5;
  else if (v_shape < 1.5) d = max(q.x, q.y) - 0.44;
  else if (v_shape < 2.5) d = (q.x + q.y - 0.6) * 0.7071;
  else if (v_shape < 3.5) d = max(q.x * 0.866 + p.y * 0.5, -p.y) - 0.28;
  else { vec2 c = max(q - vec2(0.26), 0.0); d = length(c) - 0.24; }
  #ifdef PICKING_MODE
  if (d > 0.1) discard;
  gl_FragColor = v_color;
  #else
  float fade = clamp(v_pixel, 0.001, 0.5);
  float outer = 1.0 - smoothstep(v_ringWidth * 0.5 - fade, v_ringWidth * 0.5 + fade, d);
  float inner = 1.0 - smoothstep(-v_ringWidth * 0.5 - fade, -v_ringWidth * 0.5 + fade, d);
  vec4 color = mix(v_ring, v_color, inner);
  float alpha = color.a * outer;
  gl_FragColor = vec4(color.rgb * alpha, alpha);
  #endif
}`;

const { FLOAT, UNSIGNED_BYTE, TRIANGLES } = WebGLRenderingContext;
// Of a triangle around the square of 1.3 times the node's size, which has room for the ring; the radius is 0.5.
const CORNERS = [[-0.65, -0.65], [1.95, -0.65], [-0.65, 1.95]] as const;

export class ShapeProgram extends NodeProgram<"u_matrix" | "u_sizeRatio" | "u_correctionRatio"> {
  /** While the camera moves nothing is hovered: what is drawn for picking alone, all nodes again, is left out. */
  static still = true;

  render(params: RenderParams): void {
    const { pickProgram } = this;
    if (!ShapeProgram.still) this.pickProgram = null;
    super.render(params);
    this.pickProgram = pickProgram;
  }

  getDefinition() {
    return {
      VERTICES: 3,
      VERTEX_SHADER_SOURCE: VERTEX,
      FRAGMENT_SHADER_SOURCE: FRAGMENT,
      METHOD: TRIANGLES as 4,
      UNIFORMS: ["u_matrix", "u_sizeRatio", "u_correctionRatio"] as const,
      ATTRIBUTES: [
        { name: "a_position", size: 2, type: FLOAT },
        { name: "a_size", size: 1, type: FLOAT },
        { name: "a_shape", size: 1, type: FLOAT },
        { name: "a_ringWidth", size: 1, type: FLOAT },
        { name: "a_color", size: 4, type: UNSIGNED_BYTE, normalized: true },
        { name: "a_ring", size: 4, type: UNSIGNED_BYTE, normalized: true },
        { name: "a_id", size: 4, type: UNSIGNED_BYTE, normalized: true },
        { name: "a_corner", size: 2, type: FLOAT },
      ],
    };
  }

  processVisibleItem(id: number, start: number, data: NodeDisplayData): void {
    const { shape, ring, ringWidth } = data as ShapedData;
    const { array } = this;
    const [fill, edge] = [floatColor(data.color), floatColor(ring)];
    for (const [x, y] of CORNERS) {
      array[start++] = data.x;
      array[start++] = data.y;
      array[start++] = data.size;
      array[start++] = shape;
      array[start++] = ringWidth;
      array[start++] = fill;
      array[start++] = edge;
      array[start++] = id;
      array[start++] = x;
      array[start++] = y;
    }
  }

  setUniforms({ sizeRatio, correctionRatio, matrix }: RenderParams, { gl, uniformLocations }: ProgramInfo<"u_matrix" | "u_sizeRatio" | "u_correctionRatio">): void {
    gl.uniform1f(uniformLocations.u_sizeRatio, sizeRatio);
    gl.uniform1f(uniformLocations.u_correctionRatio, correctionRatio);
    gl.uniformMatrix3fv(uniformLocations.u_matrix, false, matrix);
  }
}

const LINE_VARYINGS = /* glsl */ `varying vec4 v_color;
varying float v_side;
varying float v_half;
`;
const LINE_VERTEX = /* glsl */ `
attribute vec4 a_color;
attribute vec2 a_from;
attribute vec2 a_to;
attribute vec2 a_corner;
attribute float a_size;
uniform mat3 u_matrix;
uniform vec2 u_pixels;
${LINE_VARYINGS}void main() {
  vec2 from = (u_matrix * vec3(a_from, 1)).xy;
  vec2 to = (u_matrix * vec3(a_to, 1)).xy;
  vec2 along = (to - from) * u_pixels;
  vec2 across = vec2(-along.y, along.x) / max(length(along), 0.001);
  // Half a pixel more on both sides, where the colour fades.
  v_half = 0.5 * a_size + 0.5;
  v_side = a_corner.y * v_half;
  gl_Position = vec4(mix(from, to, a_corner.x) + across * v_side * 2.0 / u_pixels, 0, 1);
  v_color = a_color;
  v_color.a *= ${OPAQUE};
}`;

const LINE_FRAGMENT = /* glsl */ `
precision mediump float;
${LINE_VARYINGS}void main() {
  gl_FragColor = v_color * clamp(v_half - abs(v_side), 0.0, 1.0);
}`;

const LINE_CORNERS = [[0, -1], [1, -1], [0, 1], [0, 1], [1, -1], [1, 1]] as const;

/** Straight lines; colours are premultiplied with their opacity. */
export class LineProgram extends EdgeProgram<"u_matrix" | "u_pixels"> {
  getDefinition() {
    return {
      VERTICES: 6,
      VERTEX_SHADER_SOURCE: LINE_VERTEX,
      FRAGMENT_SHADER_SOURCE: LINE_FRAGMENT,
      METHOD: TRIANGLES as 4,
      UNIFORMS: ["u_matrix", "u_pixels"] as const,
      ATTRIBUTES: [
        { name: "a_from", size: 2, type: FLOAT },
        { name: "a_to", size: 2, type: FLOAT },
        { name: "a_corner", size: 2, type: FLOAT },
        { name: "a_size", size: 1, type: FLOAT },
        { name: "a_color", size: 4, type: UNSIGNED_BYTE, normalized: true },
      ],
    };
  }

  processVisibleItem(_: number, start: number, from: NodeDisplayData, to: NodeDisplayData, data: EdgeDisplayData): void {
    const { array } = this;
    const color = floatColor(data.color);
    for (const [end, side] of LINE_CORNERS) {
      array[start++] = from.x;
      array[start++] = from.y;
      array[start++] = to.x;
      array[start++] = to.y;
      array[start++] = end;
      array[start++] = side;
      array[start++] = data.size;
      array[start++] = color;
    }
  }

  setUniforms({ matrix, width, height }: RenderParams, { gl, uniformLocations }: ProgramInfo<"u_matrix" | "u_pixels">): void {
    gl.uniformMatrix3fv(uniformLocations.u_matrix, false, matrix);
    gl.uniform2f(uniformLocations.u_pixels, width, height);
  }
}
